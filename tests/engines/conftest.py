"""Scripts run in processes of their own. They import frameworks, which the processes of other tests lack."""

collect_ignore_glob = ["*/script.py", "composer/on_cpu.py", "torchtitan/on_cpu.py", "torchtitan/trainer.py"]
