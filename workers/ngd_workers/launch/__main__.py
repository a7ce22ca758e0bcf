"""python -m ngd_workers.launch ATTEMPT_DIR: runs one attempt of a job on Ray."""

from ngd_workers.launch.path import present_folder_last

if __name__ == "__main__":
    present_folder_last()
    from ngd_workers.launch.driver import main

    main()
