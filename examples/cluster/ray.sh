#!/bin/bash
# Sixteen workers with an accelerator each on a Ray cluster that is there already: ./ray.sh run.yaml
# Run it on the cluster's head node, or hand it to `ray job submit -- ./ray.sh run.yaml`, which sets RAY_ADDRESS itself.
# eft must be installed on every machine; `base_model`, `output_dir`, `dataset_prepared_path` and `ray_storage_path` must
# be on a file system that all of them see.
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
exec eft train "$1" use_ray=true ray_num_workers=16 'resources_per_worker={CPU: 8, GPU: 1}' \
  ray_storage_path=/shared/ray ray_max_failures=3
