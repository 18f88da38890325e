"""Text to token ids and back, as the checkpoint's own tokenizer does it.

What a directory holds decides which engine reads it. Where several lie together, the first wins:

1. `tokenizer.json`, by `tokenizers`: the only file that spells out normalizer, pattern and added
   tokens, where every other one leaves them to the class that reads it. The reference prefers it.
2. `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`, by tiktoken.
3. `tokenizer.model`, `spiece.model` or `spm.model`: ranks by tiktoken, pieces by sentencepiece.
4. `sentencepiece.bpe.model`: XLM-RoBERTa's unigrams under fairseq's ids, by `tokenizers`.
5. `tekken.json` of Mistral's, and `qwen.tiktoken`: ranks, by tiktoken.
6. `vocab.txt`: WordPiece, by `tokenizers`.
7. `characters.json`, zoo's own.
8. What a GGUF file says of its tokens; of such a file given alone this comes first.

Decoding never cleans spaces up (`clean_up_tokenization_spaces=False`): what was encoded comes back.
WordPiece is the exception, since its pieces do not hold their spaces: they are put between words,
and not before punctuation and contractions, as the decoder of `tokenizers` does.
"""

from zoo.tokenizers.characters import CharTokenizer
from zoo.tokenizers.core import Batch, Stream, Tokenizer
from zoo.tokenizers.reading import read, tokenizer, tokenizer_of

__all__ = ["Batch", "CharTokenizer", "Stream", "Tokenizer", "read", "tokenizer", "tokenizer_of"]
