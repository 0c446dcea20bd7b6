"""Whole datasets: plan the jobs, execute them anywhere, keep a journal, sum up."""
