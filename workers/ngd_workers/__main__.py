"""python -m ngd_workers SPEC --run-dir DIR: trains a job without Ray or a service, alone or under torchrun."""

from ngd_workers.launch.attempt import main

if __name__ == "__main__":
    main()
