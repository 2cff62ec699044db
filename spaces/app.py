"""The page as a Space of Hugging Face; README.md says what lies beside this file. MODEL, a variable, names another model."""

import os

import torch

from goca_guidance import TINY_SD, GoCASCFGPipeline
from goca_guidance.app.page import serve


if __name__ == "__main__":
    model = os.environ.get("MODEL", TINY_SD)
    gpu = torch.cuda.is_available()
    pipe = GoCASCFGPipeline.from_pretrained(model, dtype=torch.bfloat16 if gpu else torch.float32)
    serve(pipe.to("cuda" if gpu else "cpu"), model)
