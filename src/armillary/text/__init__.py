"""Text to token ids and back: tokenizers, chat templates, streaming."""

from armillary.text.stream import StreamDecoder
from armillary.text.tokenizer import Tokenizer, TokenizerSettings, fertility, train_tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerSettings", "fertility", "train_tokenizer"]
