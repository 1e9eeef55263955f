"""What the network is like: preprocessing, networks, model files, scoring and training."""
