"""Text in, fixed-size blocks of tokens out: read, tokenised once, packed, memory-mapped.

Documents are laid end to end and cut into blocks. Inside a block each document has its own positions,
counted from 0, which is how transformers recognises packed documents and keeps their attention apart
(`find_packed_sequence_indices`; only with no attention mask and no cache). Labels are already shifted:
`labels[i]` is the token to predict at position i, or -100 where the document ends.

Reading order: `text` (documents of a file), `fields` and `chat` (text of a record), `tokenise` (ids of the
documents), `packing` (which are held out, and the blocks), `corpus` (all of it, once per content, tokenizer and
options).
"""

from kvlatent.data.corpus import Corpus, evaluation_blocks, prepare
from kvlatent.data.packing import IGNORED

__all__ = ["IGNORED", "Corpus", "evaluation_blocks", "prepare"]
