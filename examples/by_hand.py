"""The same training as digits.py, with the loop written by hand: it ends with the same weights, to the bit."""

from __future__ import annotations

import torch
from digits import EPOCHS, Clock, arguments, build, callbacks, closing_table, data, loss_fn

from hookloop.callbacks import Seed
from hookloop.loop import Loop


def main() -> None:
    number, folder = arguments()
    seed = Seed(number)
    model = build().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train, val = data()
    clock = Clock()
    loop = Loop(model, optimizer, [seed, *callbacks(folder), clock], resume=folder)
    with loop:
        for _ in loop.epochs(EPOCHS):
            for step in loop.steps(train):
                for micro in step:
                    with micro:
                        micro.backward(loss_fn)
                loop.update()
            loop.validate(loss_fn, val)
    closing_table(loop, val, clock, folder)


if __name__ == "__main__":
    main()
