"""The batch that asks the runner for the most memory: a trial of it shows how much to keep free of the cache."""

from __future__ import annotations

from minivllm.batch import Batch, SlotExtras, SlotParams
from minivllm.runner.readouts import SCORED_AT_ONCE
from minivllm.sampling_params import MAX_LOGPROBS


def fullest_batch(max_num_seqs: int, max_num_tokens: int, max_model_len: int, vocab_size: int) -> Batch:
    """A first step in which every slot draws and asks for everything there is.

    Covered are, for every slot: token counts, a mask of allowed ids, an edited copy of the logits beside the model's
    own, and the draw with all filters; logprobs of all tokens, drawn and prompt, with as many likeliest tokens as
    allowed; embeddings. Not covered is what grows with a request's lists (biases, bad words): some 50 bytes an id.
    Prompt tokens are scored a few at a time, so some of them show the peak of all.
    """
    length = min(max_num_tokens // max_num_seqs, max_model_len)
    num_scored = min(length, -(-2 * SCORED_AT_ONCE // max_num_seqs))
    slots = range(max_num_seqs)
    num_top = min(MAX_LOGPROBS, vocab_size)
    return Batch(
        slots=[*slots],
        starts=[0] * max_num_seqs,
        lengths=[length] * max_num_seqs,
        token_counts=[length] * max_num_seqs,
        token_ids=[0] * (length * max_num_seqs),
        samples=[*slots],
        new_slots=[SlotParams(slot, 1.0, 50, 0.9, 0.1, slot) for slot in slots],
        new_extras=[_everything(slot, length, num_top) for slot in slots],
        scored_rows=[*slots],
        scored_counts=[num_scored] * max_num_seqs,
        scored_targets=[0] * (num_scored * max_num_seqs),
    )


def _everything(slot: int, num_tokens: int, num_top: int) -> SlotExtras:
    return SlotExtras(
        slot=slot,
        num_prompt_tokens=num_tokens,
        token_ids=[0] * num_tokens,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        repetition_penalty=2.0,
        logit_bias=((0, 1.0),),
        allowed_token_ids=(0,),
        bad_words=((0,), (0, 0)),
        min_tokens=1,
        stop_ids=(0,),
        logprobs=num_top,
        prompt_logprobs=num_top,
        pooling="mean",
    )
