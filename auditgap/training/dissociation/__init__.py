"""What all constructions share: the material that is prepared once, and the task."""
