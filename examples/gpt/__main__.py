"""Train a small GPT by what a file says: `python -m examples.gpt`. A run that was stopped goes on from its folder."""

import argparse
import json
from pathlib import Path

from flax import nnx

from functional_optimodules import Optimizer

from .model import GPT
from .train import train

parser = argparse.ArgumentParser(prog="python -m examples.gpt", description=__doc__)
parser.add_argument("--config", type=Path, default=Path(__file__).with_name("muon.json"), help="the optimizer's file")
parser.add_argument("--folder", type=Path, default=Path("demo-output/gpt"), help="where checkpoints are: %(default)s")
parser.add_argument("--steps", type=int, default=800, help="how many batches in all: %(default)s")
arguments = parser.parse_args()

model = GPT(nnx.Rngs(0))
optimizer = Optimizer.from_config(json.loads(arguments.config.read_text()))
print(optimizer.tabulate(nnx.state(model, nnx.Param)))
train(model, optimizer, arguments.steps, arguments.folder)
