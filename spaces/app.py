"""The page as a Space of Hugging Face; README.md says what lies beside this file. MODEL, a variable, names another model."""

import os

import torch

from goca_guidance import TINY_SD, GoCASCFGPipeline
from goca_guidance.app.page import serve


MODEL = os.environ.get("MODEL", TINY_SD)


def load() -> GoCASCFGPipeline:
    gpu = torch.cuda.is_available()
    pipe = GoCASCFGPipeline.from_pretrained(MODEL, dtype=torch.bfloat16 if gpu else torch.float32)
    return pipe.to("cuda" if gpu else "cpu")


if __name__ == "__main__":
    serve(load, MODEL)
