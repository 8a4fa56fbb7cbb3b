"""The model card of the bundled tiny model, filled with the numbers of the run that made it."""

from __future__ import annotations

from typing import Any

from tiny_model.data import NUM_RANKS, SPECIAL_TOKENS
from tiny_model.export import TEMPERATURE, TOP_P
from tiny_model.net import NetConfig, TinyQwen3

STAGE = """`{command}`

Seed {seed}, {steps:,} steps of {batch} windows of {length} tokens: {tokens:,} tokens ({prose_share:.0%} prose, the rest
dialogues) in {minutes:.1f} minutes on one {gpu} with PyTorch {torch}, {rate:,.0f} tokens/s with compilation. Peak
learning rate {lr:g}, decaying over the last {decay:.0%}; weight decay {weight_decay:g}; dropout {dropout:g}.
Last losses: prose {prose_loss:.3f}, dialogues {task_loss:.3f} nats a token."""
CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# The tiny model of minivllm

A language model of {params:,} parameters, small enough to travel inside the package. It continues stories in the
manner of old English books and answers {kinds} kinds of small tasks in a chat. It exists so that minivllm prints real
text offline on any machine; it is no source of knowledge.

## Architecture
`Qwen3ForCausalLM`: {layers} layers, hidden size {hidden}, {heads} attention heads over {kv_heads} key/value heads of
size {head_dim}, SwiGLU of {intermediate}, vocabulary {vocab}, tied embeddings, rotary base {theta:g}, {positions}
positions, bfloat16. The tokenizer is a byte-level BPE of {ranks} ranks and {specials} special tokens; each digit is
a token.
`tokenizer.tiktoken` holds `base64(token) rank` lines, `tokenizer_config.json` the pattern and the chat template.

## Data and licence
The model is ours, trained from scratch, licensed Apache-2.0. It learned from
* books in the public domain (Project Gutenberg and novels printed 1839-1919, {books} books used): {novel_bytes:.1f} MB
  of novels and {story_bytes:.1f} MB of simple prose, the latter counting the fairy tales of the FairytaleQA data set
  (Apache-2.0), which are drawn more often than their share. Verse and plays
  (Shakespeare, Milton, Blake, Whitman) were left out;
* dialogues made by `bench/tiny_tasks.py` and `examples/tiny_model/talk.py` (ours).
The last 1.5 % of each book, all validation stories of FairytaleQA and a tenth of all task contents (by a stable hash)
were never trained on.

## Training
{stages}

Muon for the matrices, AdamW for the embedding and the norms; warm-up, constant rate, then linear decay to zero. In the
dialogues only the assistant's words count in the loss.

## Results on held-out data
| text | perplexity per token | bits per byte | tokens |
|---|---|---|---|
{text_rows}

Windows of {length} tokens, each predicted from its own beginning only. Settings were chosen between runs by these same
figures and tasks, so they are slightly optimistic.

Exact match of greedy answers, {per_kind} held-out tasks a kind, **{overall:.1%}** overall:

| kind | exact | kind | exact | kind | exact |
|---|---|---|---|---|---|
{task_rows}

## Samples
Temperature {temperature:g}, top_p {top_p:g}, one seed, not chosen; cut after 160 tokens.

{samples}

{chats}

## Limits
Sentences are mostly well formed; their sense is not: plots, persons and pronouns drift from one sentence to the next,
phrases repeat, and openings of tales come back nearly word for word. It knows no facts. Tasks outside the {kinds}
kinds, longer lists than those it saw, numbers above the trained ranges and words outside the task lists fail. The
books carry the views of their time. English only.
"""


def _task_rows(accuracy: dict[str, float]) -> str:
    cells = [f"{kind} | {share:.0%}" for kind, share in accuracy.items()]
    cells += [" | "] * (-len(cells) % 3)
    return "\n".join(f"| {' | '.join(cells[i : i + 3])} |" for i in range(0, len(cells), 3))


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


def num_parameters(config: NetConfig) -> int:
    """Parameters of the network, the tied embedding counted once."""
    return sum(p.numel() for p in TinyQwen3(config).parameters())


def write_card(config: NetConfig, record: dict[str, Any]) -> str:
    """The card's text from the shape and the record of the run: facts of the corpus, stages of training, results."""
    results = record["results"]
    text_rows = "\n".join(
        f"| {group} | {r['perplexity']:.2f} | {r['bits_per_byte']:.3f} | {r['tokens']:,} |"
        for group, r in results["text"].items()
    )
    return CARD.format(
        params=num_parameters(config),
        ranks=NUM_RANKS,
        specials=len(SPECIAL_TOKENS),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        theta=config.rope_theta,
        positions=config.max_position_embeddings,
        length=record["stages"][-1]["length"],
        stages="\n\n".join(STAGE.format(**stage) for stage in record["stages"]),
        kinds=len(results["accuracy"]),
        per_kind=results["per_kind"],
        overall=results["overall"],
        text_rows=text_rows,
        task_rows=_task_rows(results["accuracy"]),
        samples="\n\n".join(_quote(sample) for sample in results["samples"]),
        chats="\n\n".join(f"**{ask}**\n\n{_quote(answer)}" for ask, answer in results["chats"]),
        temperature=TEMPERATURE,
        top_p=TOP_P,
        **record["corpus"],
    )
