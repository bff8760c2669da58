"""The program that test_models_distributed.py runs once per rank."""
