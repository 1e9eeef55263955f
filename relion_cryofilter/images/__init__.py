"""From boxes as they are stored to network input."""
