"""``python -m trace_cli`` is ``trace``: how several processes are started, by torchrun or by ``--nproc-per-node``."""

from trace_cli.main import main

if __name__ == "__main__":
    main()
