"""Greedy generation in batches; as a command, a prompt through a saved run.

python -m experiments.generate RUN --prompt TEXT [--base] [--max-new-tokens N]
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from .batches import pad
from .model import Loaded
from .parallel import ALONE, Team
from .record import complaining
from .tasks import BadInput


@torch.no_grad()
def generate(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    tick: Callable[[], None] = lambda: None,
    team: Team = ALONE,
) -> list[str]:
    """The greedy continuation of each prompt (token ids), up to the end of sequence.

    Prompts are padded on the left and masked, so that the batch size changes no answer. New tokens
    may fill half of the model's positions, or what prompts leave; a longer prompt loses its
    beginning.
    """
    import transformers

    tokenizer, model = loaded.tokenizer, loaded.model.eval()
    device = next(model.parameters()).device
    new = min(max_new_tokens, loaded.positions // 2)
    room = loaded.positions - new
    settings = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[tuple[int, str]] = []
    indices = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    portions = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    for portion in team.turns(portions):
        rows = [list(prompts[i])[-room:] for i in portion]
        ids = pad(rows, tokenizer.pad_token_id, left=True).to(device)
        mask = pad([[1] * len(row) for row in rows], 0, left=True).to(device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(portion, out[:, ids.shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in row:
                row = row[: row.index(tokenizer.eos_token_id)]
            texts.append((i, tokenizer.decode(row, skip_special_tokens=True)))
        tick()
    return team.merge(texts)


@complaining
def main() -> int:
    """The command."""
    from .saved import open_run

    parser = argparse.ArgumentParser(prog="python -m experiments.generate", description=__doc__)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--base", action="store_true", help="the model without the adapter")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args()
    if given.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {given.max_new_tokens}: a positive number")
    loaded, adapter = open_run(given.run)
    ids = loaded.tokenizer(given.prompt).input_ids
    if not ids:
        raise BadInput("--prompt: empty; the model needs a token to begin with")
    if given.base:
        adapter.detach()
    print(generate(loaded, [ids], max_new_tokens=given.max_new_tokens, batch_size=1)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
