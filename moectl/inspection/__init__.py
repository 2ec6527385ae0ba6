"""What the routers do: traces, specialisation and its nulls."""
