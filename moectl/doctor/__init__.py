"""``moectl doctor``: is this machine fit, and is anything wrong with this model? Looks, and changes nothing."""
