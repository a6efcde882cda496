"""Prints docs/training_memory.md."""

from auditgap.training.memory.page import document

print(document(), end="")
