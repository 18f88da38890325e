"""Training: one loop for every architecture. In the order in which a run uses them:

- `recipe`: what a run is told, complete with help; echoed as `recipe.yaml`
- `data`, `text_files`: texts become token files, or pairs of texts
- `batches`: a batch depends on the seed and the step alone, whatever the number of processes
- `objectives`: what is learned, by the model's head
- `sizes`: a small model of any architecture
- `optimizers`, `schedules`: which parameters decay, and the learning rate of each step
- `processes`: torchrun, DDP and FSDP
- `loop`: the steps
- `run`, `states`: the run's directory, and checkpoints that are resumed bit for bit
- `observers`: what a person sees
- `start`: `zoo.train`, which composes all of this
"""
