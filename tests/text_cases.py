"""Three short texts with prompts and answers, padded on either side or packed into one row."""

import torch

PROMPTS = ([3, 4, 5], [7, 8], [2, 9, 11, 6])
ANSWERS = ([6, 1], [5, 5, 2, 8], [10])


def padded(side, prompts=PROMPTS, answers=ANSWERS):
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    rows = {"input_ids": [], "attention_mask": [], "answer_mask": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        pad = [0] * (width - len(prompt) - len(answer))
        for name, values in zip(
            rows, (prompt + answer, [1] * len(prompt + answer), [0] * len(prompt) + [1] * len(answer)), strict=True
        ):
            rows[name].append(pad + values if side == "left" else values + pad)
    return {name: torch.tensor(values) for name, values in rows.items()}


def packed(order=(2, 0, 1), pad=2):
    """All texts in one row, in another order than their numbers, with padding between them."""
    ids, mask, answer, index = [], [], [], []
    for number in order:
        prompt, completion = PROMPTS[number], ANSWERS[number]
        length = len(prompt + completion)
        ids += prompt + completion + [0] * pad
        mask += [1] * length + [0] * pad
        answer += [0] * len(prompt) + [1] * len(completion) + [0] * pad
        index += [number] * length + [-1] * pad
    batch = {"input_ids": ids, "attention_mask": mask, "answer_mask": answer, "text_index": index}
    return {name: torch.tensor([values]) for name, values in batch.items()}
