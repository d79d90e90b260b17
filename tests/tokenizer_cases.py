"""Byte-level tokenizers, trained on a few texts."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def byte_level(corpus, *, bos=False, eos=False, splits=True, vocab_size=600) -> PreTrainedTokenizerFast:
    """A GPT-like tokenizer in which the space belongs to the word that follows it.

    If it does not split texts first, it merges over the end of the prompt, and knows the corpus' characters alone.
    """
    tokenizer = Tokenizer(models.BPE())
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if splits else sorted(set("".join(corpus))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
