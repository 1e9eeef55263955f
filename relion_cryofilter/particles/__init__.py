"""The files that particles come in: STAR, CryoSPARC, tables, image stacks, and labels."""
