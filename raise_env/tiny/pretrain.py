"""Pre-trains the embedded base model: `python -m raise_env.tiny.pretrain --out DIR`.

Seeded throughout: on one machine the same script gives the same weights, and so the same hash. The text is half plain
statements and half reports of questions and answers (see `skills`); the frame in which instructions are asked never
occurs in it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .skills import REPORTS, SKILLS

NUM_STEPS = 4000
NUM_SEQUENCES = 32
SEQUENCE_LENGTH = 96
LEARNING_RATE = 2e-3
SEED = 0
NUM_THREADS = 2

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

# Few characters, since every one is a token; none of it occurs in the pre-training text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Task: {{ message['content'] }}\n"
    "{% else %}Answer: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes: any text can be encoded, and nothing had to be learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(vocabulary_size: int) -> LlamaForCausalLM:
    """Return the untrained base model, 0.84 million parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield pre-training sentences without end: half statements, half reports, skills alike often."""
    while True:
        skill = rng.choice(SKILLS)
        fact = rng.choice(skill.facts)
        if rng.random() < 0.5:
            yield skill.state(fact, rng.randrange(len(skill.statements)))
        else:
            question = skill.ask(fact, rng.randrange(len(skill.questions)))
            yield rng.choice(REPORTS).format(q=question, y=fact.answer)


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[torch.Tensor]:
    """Yield batches of token ids, shape (NUM_SEQUENCES, SEQUENCE_LENGTH), cut from one stream of sentences."""
    stream: list[int] = []
    source = sentences(rng)
    size = NUM_SEQUENCES * SEQUENCE_LENGTH
    while True:
        while len(stream) < size:
            stream += [*tokenizer(next(source))["input_ids"], tokenizer.eos_token_id]
        yield torch.tensor(stream[:size]).view(NUM_SEQUENCES, SEQUENCE_LENGTH)
        stream = stream[size:]


def pretrain(out: Path, num_steps: int = NUM_STEPS) -> str:
    """Train the base model, write it with its tokenizer to `out`, and return the weights' SHA-256."""
    # Sums are shared out among threads: another number of them gives other last digits, and so another hash.
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=num_steps)
    source = batches(tokenizer, random.Random(SEED))
    progress = tqdm(range(num_steps), desc="pre-training", mininterval=5)
    for step in progress:
        ids = next(source)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Parse the command line and pre-train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base", help="folder to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="optimiser steps")
    arguments = parser.parse_args()
    print(f"sha256 {pretrain(arguments.out, arguments.steps)}")


if __name__ == "__main__":
    main()
