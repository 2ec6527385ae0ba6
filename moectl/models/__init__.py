"""Our own small decoder, dense or Mixture of Experts."""
