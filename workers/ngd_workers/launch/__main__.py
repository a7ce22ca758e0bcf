"""python -m ngd_workers.launch ATTEMPT_DIR: runs one attempt of a job on Ray."""

from ngd_workers.launch.driver import main

if __name__ == "__main__":
    main()
