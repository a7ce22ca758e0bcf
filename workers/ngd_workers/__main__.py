"""python -m ngd_workers SPEC --run-dir DIR: trains a job without Ray or a service, alone or under torchrun."""

from ngd_workers.launch.path import present_folder_last

if __name__ == "__main__":
    present_folder_last()
    from ngd_workers.launch.attempt import main

    main()
