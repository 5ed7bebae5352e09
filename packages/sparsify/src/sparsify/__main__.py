"""``python -m sparsify MODEL [DATASET] ...`` trains, as EleutherAI's sparsify does."""

from sparsify.cli import train

if __name__ == "__main__":
    train(prog_name="python -m sparsify")
