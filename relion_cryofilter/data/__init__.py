"""What particles are like: STAR text, particle sets, image stacks, simulation."""
