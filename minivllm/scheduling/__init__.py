"""Parts of the scheduler's policy that stand on their own: the waiting queue, and the forecast of block use."""
