"""The mathematics of the method: pure functions over tensors, without models, disks or globals."""
