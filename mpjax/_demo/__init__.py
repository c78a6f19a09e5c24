"""The main job, `python -m mpjax compare`: what it trains, shows and keeps."""
