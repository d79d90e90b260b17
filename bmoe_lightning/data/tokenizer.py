"""A word-level tokenizer trained on the text of a task, for small models on real data without any download."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PADDING_WORD = "[PAD]"
UNKNOWN_WORD = "[UNK]"
KEPT_WORDS = ("Answer:", "A", "B", "C", "D", "E", ".", "yes", "no", "true", "false")

# "Answer:" first, so that the end of every prompt is one token; then words with their apostrophes, then single signs.
_WORD = r"\bAnswer:|\w+(?:['\u2019]\w+)*|[^\w\s]"


def train_word_tokenizer(
    texts: Iterable[str], *, max_vocab: int, keep: Sequence[str] = KEPT_WORDS
) -> PreTrainedTokenizerFast:
    """Train a word-level tokenizer on the most frequent words of some texts.

    Train it on training text alone (rendered prompts, so that the words of the prompt format are included), or words of
    the test split leak into the vocabulary. White space is dropped, so ` A` and `A` are the same token. It is
    case-sensitive, to tell the letter `A` from the article `a`. No special token is ever added to a text. Ties are
    broken alphabetically, so the same texts always give the same vocabulary. It saves and loads with `save_pretrained`
    and `from_pretrained`, without a network.

    Args:
        texts: Training texts.
        max_vocab: Maximum size of the vocabulary, padding and unknown token included.
        keep: Words that are included whatever their frequency; each must be a single token.

    Returns:
        The tokenizer, with `pad_token` id 0 and `unk_token` id 1.

    Raises:
        ValueError: If there is no text, `max_vocab` leaves no room for words, or an entry of `keep` is not one word.
    """
    splitter = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    for word in keep:
        if [piece for piece, _ in splitter.pre_tokenize_str(word)] != [word]:
            raise ValueError(f"the word {word!r} of keep is not one word to this tokenizer; leave it out")
    reserved = list(dict.fromkeys((PADDING_WORD, UNKNOWN_WORD, *keep)))
    if max_vocab <= len(reserved):
        raise ValueError(f"max_vocab is {max_vocab}; it must exceed the {len(reserved)} reserved entries")
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    if not counts:
        raise ValueError("the texts hold no word; pass the rendered prompts of the training split")
    frequent = sorted((word for word in counts if word not in reserved), key=lambda word: (-counts[word], word))
    words = reserved + frequent[: max_vocab - len(reserved)]

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING_WORD, unk_token=UNKNOWN_WORD)
