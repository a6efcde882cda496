"""How much a stranger's model may ask for before it is refused: every bound, and its reason."""

from __future__ import annotations

#: Bytes of a file that is read whole; the largest tokenizers have 35 MB.
LARGEST_TEXT = 200_000_000
#: Bytes of a safetensors header: the largest shards of real models have a few hundred kilobytes.
LARGEST_HEADER = 10_000_000
#: Blocks that a config may name whatever its weights hold: the deepest models have a few hundred.
#: Beyond it there has to be a tensor for each, since layers that share theirs are laid out apart.
MOST_BLOCKS = 1_000
#: A width, a vocabulary or a number of heads that a config may name whatever its weights hold;
#: beyond it, it is held to so many times the longest side of any of its tensors.
LARGEST_SIZE, TIMES_LONGEST_SIDE = 1_000_000, 64
#: Tokens that stand beside a tokenizer's own vocabulary; models of speech and pictures have 33,000,
#: and each costs a tenth of a millisecond to add.
MOST_ADDED_TOKENS = 65_536
#: Characters that a tokenizer's rules may make of one, before splitting and after joining; those of
#: real ones make 4, and a prompt of a million characters has to stay in memory.
MOST_GROWTH = 100
#: Pieces of a template that a tokenizer puts around a text; real ones have 5.
MOST_PIECES = 100
#: Of the child that tries a tokenizer's or an adapter's patterns: seconds of CPU (real ones take
#: one), bytes of address space (Linux; macOS keeps no such bound), and letters of one text.
TRIAL_SECONDS, TRIAL_BYTES, TRIAL_LETTERS = 20, 4 << 30, 2_000
#: Of the child that runs a chat template: seconds of CPU of one rendering, compiling included (a
#: real one takes a thousandth), and bytes of address space.
TEMPLATE_SECONDS, TEMPLATE_BYTES = 3.0, 1 << 30
#: Characters of a chat template, and of its output beyond four times what it was given.
LONGEST_TEMPLATE = 1_000_000
