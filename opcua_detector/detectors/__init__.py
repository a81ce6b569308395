"""The methods: ways to look at a row, each made of residual channels."""
