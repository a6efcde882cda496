"""The parts of `training.dissociate`: what is prepared once, the task that both constructions
share, and each of the two."""
