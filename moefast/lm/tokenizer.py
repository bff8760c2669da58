"""A tokenizer for random checkpoints: works offline, and gives back every text it is given.

Byte-level BPE without merges: each byte of UTF-8 is one token. The rest of the model's vocabulary is made
of pronounceable words, never produced by encoding, so that whatever a random model says can be read and
compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import refuse

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = tuple(c + v for c in _CONSONANTS for v in _VOWELS)

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class SpecialTokens(NamedTuple):
    """Ids of the special tokens a configuration names."""

    bos: int
    eos: int
    pad: int


def write_tokenizer(out: Path, vocab_size: int) -> SpecialTokens:
    """Write tokenizer.json and tokenizer_config.json into ``out``.

    Args:
        out: an existing directory.
        vocab_size: of the model; every id below it is a token.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes and the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    # Sorted: the library promises no order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        refuse("write_tokenizer", f"vocab_size must be at least {least}", vocab_size)
    tokens = [*SPECIAL, *alphabet, *(_word(i) for i in range(vocab_size - least))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    ids = SpecialTokens(bos=tokens.index("<bos>"), eos=tokens.index("<eos>"), pad=tokens.index("<pad>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids.bos)]
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "add_prefix_space": False,
        "bos_token": "<bos>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return ids


def _word(index: int) -> str:
    """The index-th word: ``Ġbeba``, ``Ġbebe``, ...; no two alike. Ġ is byte-level BPE's leading space."""
    syllables: list[str] = []
    index += len(_SYLLABLES)  # at least two syllables
    while index:
        index, rest = divmod(index, len(_SYLLABLES))
        syllables.append(_SYLLABLES[rest])
    return "Ġ" + "".join(reversed(syllables))
