"""What RELION is like: the External job, its output nodes, its job files."""
