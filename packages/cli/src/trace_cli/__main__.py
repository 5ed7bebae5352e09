"""``python -m trace_cli`` is ``trace``: how several processes are started, by torchrun or by ``--nproc-per-node``."""

from trace_cli._program import program

if __name__ == "__main__":
    program()
