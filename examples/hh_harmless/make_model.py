"""A small Llama-shaped model without weights, and a tokenizer made for the file it will be trained on.

    python examples/hh_harmless/make_model.py FILE FOLDER [NAME=NUMBER ...]

`FILE` is anything `data.train` takes, in the Anthropic-HH form. The folder gets `config.json` (17 M parameters: hidden 384,
8 layers, vocabulary 8192) and a byte-level BPE tokenizer; training draws the weights from `run.seed`. Parts of the shape can be
given by their names in `config.json`: `hidden_size=128 num_hidden_layers=4`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.schema import BadRow

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
}


def texts(source: str) -> Iterator[str]:
    """Both transcripts of every usable row."""
    for file in list_sources(source):
        for batch in iterate(file, 1000):
            for _, record in batch:
                if not isinstance(record, BadRow):
                    yield record["chosen"]
                    yield record["rejected"]


def make_tokenizer(source: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(source), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main(source: str, folder: str, **shape: int) -> None:
    config = LlamaConfig(**SHAPE | shape, bos_token_id=None, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    config.architectures = ["LlamaForCausalLM"]
    make_tokenizer(source, config.vocab_size).save_pretrained(folder)
    config.save_pretrained(folder)
    print(f"model without weights in {Path(folder).absolute()}")


def parse(assignments: list[str]) -> dict[str, int]:
    """Parts of the shape. Exits where one is not of the form, or not among them."""
    parts = [each.partition("=") for each in assignments]
    for name, _, number in parts:
        if name not in SHAPE or not number.isdigit():
            sys.exit(f"make_model: {name}={number} is not NAME=NUMBER with a name of {', '.join(SHAPE)}")
    return {name: int(number) for name, _, number in parts}


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:3], **parse(sys.argv[3:]))
