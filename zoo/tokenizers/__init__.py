"""Tokenizers: text to token ids and back, as the checkpoint's own tokenizer does it.

The files of a directory decide which library reads them. If there are several, the first wins:

1. `tokenizer.json`, by `tokenizers`: the only file that spells out normalizer, pattern and added
   tokens; every other one leaves them to the class that reads it. The reference prefers it.
2. `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`: byte-level BPE, by tiktoken.
3. `tokenizer.model`, `spiece.model` or `spm.model`: ranks by tiktoken, else by sentencepiece.
4. `sentencepiece.bpe.model`: XLM-RoBERTa's unigrams under fairseq's ids, by `tokenizers`.
5. Mistral's `tekken.json`, and `qwen.tiktoken`: ranks, by tiktoken.
6. `vocab.txt`: WordPiece, by `tokenizers`.
7. `characters.json`, zoo's own.
8. The vocabulary in a GGUF file; for a reference to the file itself this comes first.

Decoding keeps all spaces (`clean_up_tokenization_spaces=False`): decoding an encoded text returns
the text. WordPiece is the exception, since its pieces do not contain spaces: they are put between
words, and not before punctuation and contractions, as the decoder of `tokenizers` does.
"""

from zoo.tokenizers.characters import CharTokenizer
from zoo.tokenizers.core import Batch, TextStream, Tokenizer
from zoo.tokenizers.load import read, tokenizer, tokenizer_of

__all__ = ["Batch", "CharTokenizer", "TextStream", "Tokenizer", "read", "tokenizer", "tokenizer_of"]
