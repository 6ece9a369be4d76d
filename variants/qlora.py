"""QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., NeurIPS 2023), arXiv:2305.14314.

    W = decode(encode(W0)) + s B A,    a block's number = its code's value times its largest |w|

The table is NormalFloat's (`nf4.py`), blocks have 64 numbers, and double quantization puts their
scales into 8 bits. Official code: artidoro/qlora, qlora.py, on bitsandbytes. The base stays frozen
in 4 bits; a product decodes one matrix and drops it again. With PEFT the base is bitsandbytes' as
well and the adapter fp32, as here, where the official script has it in bf16; PEFT's merge quantizes
the sum again, here merging gives the decoded weights with the change in them.

What a number costs in blocks of 64, and that nothing but the factors learns while the product is
that of the decoded weights:

>>> import torch
>>> import variants
>>> net = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))
>>> layer = variants.attach(net, "qlora", rank=4).layers["0"]
>>> round(layer.frozen.stored.bits / 512**2, 6), [name for name, _ in net.named_parameters()]
(4.126953, ['0.params.A', '0.params.B'])
>>> x = torch.randn(3, 512)
>>> torch.equal(net(x), x @ layer.frozen.stored.dense().T)
True
"""

from ._registry import preset

preset(
    "qlora",
    base="nf4_dq",
    rank=64,
    alpha=16,
    lr=2e-4,
    lr_origin="the paper's Table 9, 7B and 13B",
)
