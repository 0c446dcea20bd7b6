"""What happens to a scan: each stage is a function from product to product."""
