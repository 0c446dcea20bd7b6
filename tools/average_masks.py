"""Average the weights of two brain-mask networks: often better than either on heads of both kinds.

    python tools/average_masks.py A.safetensors B.safetensors OUT.safetensors

The result's description is that of B, with the SHA-256 of both.
"""

import argparse
from pathlib import Path

import torch

from cadiff_cli.io.weights import load_brain_model, save_brain_model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("a", "b", "out"):
        parser.add_argument(name, type=Path)
    wanted = parser.parse_args()
    a, b = load_brain_model(str(wanted.a)), load_brain_model(str(wanted.b))
    first, second = a.net.state_dict(), b.net.state_dict()
    mean = {key: torch.lerp(first[key].float(), second[key].float(), 0.5) for key in second}
    b.net.load_state_dict(mean)
    save_brain_model(
        wanted.out, b.net, {**b.metadata["training"], "average_of": [a.sha256, b.sha256]}
    )


if __name__ == "__main__":
    main()
