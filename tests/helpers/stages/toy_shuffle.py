"""Prepares: the hidden channels of every MLP in another order and scale, which changes nothing that it computes."""

import torch

CALLS = []


@torch.no_grad()
def prepare(model, options):
    CALLS.append(model.batches)
    for name, module in model.module.named_modules():
        if f"{name}.down_proj" in model.linears:
            count = module.down_proj.in_features
            order = torch.randperm(count, generator=model.generator)
            scales = 2.0 ** torch.randint(-2, 3, (count,), generator=model.generator)
            module.gate_proj.weight.copy_(module.gate_proj.weight[order])
            module.up_proj.weight.copy_(module.up_proj.weight[order] * scales[:, None])
            if module.up_proj.bias is not None:
                module.gate_proj.bias.copy_(module.gate_proj.bias[order])
                module.up_proj.bias.copy_(module.up_proj.bias[order] * scales)
            module.down_proj.weight.copy_(module.down_proj.weight[:, order] / scales)
    model.notices.append("toy_shuffle: shuffled")
