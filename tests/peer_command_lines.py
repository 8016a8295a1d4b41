"""Argument lists that users bring along: a random sample of DeepSpeed-Chat's training scripts, and alpaca-rlhf's own.

Only the arguments of main.py, with shell variables replaced by their defaults. `local_rank` is what the launcher adds.
"""

_BLEND = "Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets"
_MODELS = "--actor_model_name_or_path /models/actor --critic_model_name_or_path /models/critic"

STEP1 = {
    "llama2/run_llama2_7b_lora.sh": f"""--local_rank=0 --data_path {_BLEND} --data_split 2,4,4
        --model_name_or_path meta-llama/Llama-2-7b-hf --per_device_train_batch_size 4 --per_device_eval_batch_size 4
        --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 4 --gradient_accumulation_steps 1
        --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --gradient_checkpointing --zero_stage 3 --deepspeed
        --lora_dim 128 --lora_module_name "layers." --output_dir ./output_step1_llama2_7b_lora""",
    "opt/single_gpu/run_1.3b.sh": """--local_rank=0 --model_name_or_path facebook/opt-1.3b
        --gradient_accumulation_steps 8 --lora_dim 128 --zero_stage 0 --enable_tensorboard --tensorboard_path ./output
        --deepspeed --output_dir ./output""",
    "opt/single_node/run_1.3b_lora.sh": f"""--local_rank=3 --data_path {_BLEND} --data_split 2,4,4
        --model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8 --per_device_eval_batch_size 8
        --max_seq_len 512 --learning_rate 1e-3 --weight_decay 0.1 --num_train_epochs 16 --gradient_accumulation_steps 1
        --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --zero_stage 0 --lora_dim 128
        --lora_module_name decoder.layers. --only_optimize_lora --deepspeed --output_dir ./output""",
    "other_language/run_chinese.sh": """--local_rank=0 --data_path wangrui6/Zhihu-KOL
        Cohere/miracl-zh-queries-22-12 Hello-SimpleAI/HC3-Chinese mkqa-Chinese --data_split 10,0,0
        --model_name_or_path bigscience/bloom-1b1 --per_device_train_batch_size 8 --per_device_eval_batch_size 8
        --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 16
        --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --zero_stage 2
        --deepspeed --output_dir ./output""",
    "alpaca-rlhf": """--local_rank=1 --sft_only_data_path MultiTurnAlpaca --data_output_path /tmp/rlhf/tmp/
        --model_name_or_path decapoda-research/llama-7b-hf --per_device_train_batch_size 8
        --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 3e-4 --num_train_epochs 1
        --gradient_accumulation_steps 8 --num_warmup_steps 100 --output_dir /tmp/rlhf/actor --lora_dim 8
        --lora_module_name q_proj,k_proj --only_optimize_lora --deepspeed --zero_stage 2""",
}

STEP2 = {
    "llama2/run_llama2_7b_lora.sh": """--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4
        --model_name_or_path meta-llama/Llama-2-7b-hf --per_device_train_batch_size 8 --per_device_eval_batch_size 8
        --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0.1 --num_padding_at_beginning 0 --num_train_epochs 1
        --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234
        --gradient_checkpointing --zero_stage 3 --deepspeed --offload --lora_dim 128 --lora_module_name "layers."
        --output_dir ./output_step2_llama_7b_epoch1_lr9.65e-6""",
    "opt/single_gpu/run_350m.sh": """--local_rank=0 --model_name_or_path facebook/opt-350m
        --num_padding_at_beginning 1 --weight_decay 0.1 --dropout 0.0 --gradient_accumulation_steps 4 --zero_stage 0
        --enable_tensorboard --tensorboard_path ./output --deepspeed --output_dir ./output""",
    "opt/multi_node/run_350m.sh": f"""--local_rank=7 --data_path {_BLEND} --data_split 2,4,4
        --model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 --per_device_train_batch_size 2
        --per_device_eval_batch_size 2 --max_seq_len 512 --learning_rate 5e-5 --weight_decay 0.1 --dropout 0.0
        --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234
        --zero_stage 0 --deepspeed --output_dir ./output""",
    "alpaca-rlhf": """--local_rank=0 --data_output_path /tmp/rlhf/tmp/
        --model_name_or_path decapoda-research/llama-7b-hf --num_padding_at_beginning 0 --per_device_train_batch_size 4
        --per_device_eval_batch_size 64 --learning_rate 5e-4 --num_train_epochs 1 --gradient_accumulation_steps 1
        --num_warmup_steps 0 --zero_stage 2 --deepspeed --output_dir /tmp/rlhf/critic --lora_dim 8
        --lora_module_name q_proj,k_proj --only_optimize_lora""",
}

DPO = {
    "llama2/run_llama2_7b_lora.sh": """--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4
        --model_name_or_path meta-llama/Llama-2-7b-hf --per_device_train_batch_size 8 --per_device_eval_batch_size 8
        --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0.1 --num_train_epochs 1
        --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234
        --gradient_checkpointing --zero_stage 3 --deepspeed
        --offload --lora_dim 128 --lora_module_name "layers." --output_dir ./output""",
    "opt/single_gpu/run_350m.sh": """--local_rank=0 --model_name_or_path facebook/opt-350m --weight_decay 0.1
        --dropout 0.0 --gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard --tensorboard_path ./output
        --deepspeed --output_dir ./output""",
    "opt/single_node/sweep/run_single.sh": f"""--local_rank=0 --data_path {_BLEND} --data_split 2,4,4
        --model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 --per_device_train_batch_size 4
        --per_device_eval_batch_size 4 --max_seq_len 512 --learning_rate 5e-5 --weight_decay 0.1 --num_train_epochs 1
        --dropout 0.0 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234
        --zero_stage 2 --deepspeed --output_dir ./output --offload""",
}

STEP3 = {
    "llama2/run_llama2_7b.sh": f"""--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4 {_MODELS}
        --num_padding_at_beginning 1 --per_device_generation_batch_size 1 --per_device_training_batch_size 1
        --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
        --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 --critic_weight_decay 0.1
        --num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_gradient_checkpointing
        --critic_gradient_checkpointing --offload_reference_model --actor_dropout 0.0 --num_warmup_steps 100 --deepspeed
        --seed 1234 --actor_zero_stage 3 --critic_zero_stage 3 --enable_hybrid_engine
        --output_dir ./output_step3_llama""",
    "llama2/run_llama2_7b_mixz.sh": f"""--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4 {_MODELS}
        --num_padding_at_beginning 1 --per_device_generation_batch_size 1 --per_device_training_batch_size 1
        --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
        --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 --critic_weight_decay 0.1
        --num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_gradient_checkpointing
        --critic_gradient_checkpointing --offload_reference_model --actor_dropout 0.0 --num_warmup_steps 100 --deepspeed
        --seed 1234 --actor_zero_stage 3 --critic_zero_stage 3 --enable_mixed_precision_lora --actor_lora_dim 64
        --critic_lora_dim 64 --critic_lora_module_name "layers." --actor_lora_module_name "layers."
        --output_dir ./output_step3_llama2""",
    "opt/multi_node/run_66b.sh": f"""--local_rank=5 --data_path Dahoas/rm-static --data_split 2,4,4 {_MODELS}
        --num_padding_at_beginning 1 --per_device_generation_batch_size 4 --per_device_training_batch_size 4
        --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
        --actor_learning_rate 5e-4 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 --critic_weight_decay 0.1
        --num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 --num_warmup_steps 100
        --deepspeed --seed 1234 --enable_hybrid_engine --inference_tp_size 8 --tp_gather_partition_size 4
        --actor_zero_stage 3 --critic_zero_stage 3 --actor_gradient_checkpointing --actor_dropout 0.0
        --actor_lora_dim 128 --actor_lora_module_name decoder.layers. --output_dir ./output""",
    "opt/single_gpu/run_1.3b.sh": f"""--local_rank=0 {_MODELS} --actor_zero_stage 0 --critic_zero_stage 0
        --num_padding_at_beginning 1 --gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128
        --enable_hybrid_engine --actor_gradient_checkpointing --actor_dropout 0.0 --output_dir ./output""",
    "opt/single_gpu/run_6.7b_lora.sh": f"""--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4 {_MODELS}
        --num_padding_at_beginning 1 --per_device_generation_batch_size 8 --per_device_training_batch_size 8
        --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
        --actor_learning_rate 5e-4 --critic_learning_rate 5e-6 --num_train_epochs 1 --lr_scheduler_type cosine
        --gradient_accumulation_steps 16 --num_warmup_steps 100 --deepspeed --seed 1234 --actor_zero_stage 0
        --critic_zero_stage 0 --offload --actor_lora_dim 128 --actor_gradient_checkpointing
        --critic_gradient_checkpointing --actor_dropout 0.0 --enable_hybrid_engine --output_dir ./output""",
    "opt/single_node/run_1.3b.sh": f"""--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4 {_MODELS}
        --num_padding_at_beginning 1 --per_device_generation_batch_size 4 --per_device_training_batch_size 4
        --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
        --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --num_train_epochs 1 --lr_scheduler_type cosine
        --gradient_accumulation_steps 1 --actor_dropout 0.0 --num_warmup_steps 100 --deepspeed --seed 1234
        --enable_hybrid_engine --actor_zero_stage 2 --critic_zero_stage 2 --enable_ema --output_dir ./output
        --enable_tensorboard --tensorboard_path ./output""",
    "opt/single_node/sweep/run_single.sh": f"""--local_rank=0 --data_path Dahoas/rm-static --data_split 2,4,4 {_MODELS}
        --num_padding_at_beginning 1 --per_device_generation_batch_size 4 --per_device_training_batch_size 4
        --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
        --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --num_train_epochs 1 --lr_scheduler_type cosine
        --gradient_accumulation_steps 1 --actor_weight_decay 0 --critic_weight_decay 0 --num_warmup_steps 100
        --deepspeed --seed 1234 --actor_dropout 0.0 --print_answers --actor_zero_stage 2 --critic_zero_stage 2
        --output_dir ./output --enable_hybrid_engine --offload --enable_mixed_precision_lora --actor_lora_dim 128
        --actor_lora_module_name decoder.layers. --enable_test_mode --test_stop_step 100""",
    "alpaca-rlhf, two GPUs": """--local_rank=1 --data_output_path /tmp/rlhf/tmp/
        --actor_model_name_or_path /tmp/rlhf/actor/ --tokenizer_name_or_path decapoda-research/llama-7b-hf
        --critic_model_name_or_path /tmp/rlhf/critic --actor_zero_stage 2 --critic_zero_stage 2
        --num_padding_at_beginning 0 --per_device_train_batch_size 4 --per_device_mini_train_batch_size 4 --ppo_epochs 2
        --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --gradient_accumulation_steps 1 --deepspeed
        --actor_lora_dim 8 --actor_lora_module_name q_proj --critic_lora_dim 8 --critic_lora_module_name q_proj,k_proj
        --only_optimize_lora --output_dir /tmp/rlhf/final""",
    "alpaca-rlhf, one GPU": """--local_rank=0 --data_output_path /tmp/rlhf/tmp/
        --actor_model_name_or_path /tmp/rlhf/actor/ --tokenizer_name_or_path decapoda-research/llama-7b-hf
        --critic_model_name_or_path /tmp/rlhf/critic --actor_zero_stage 0 --critic_zero_stage 0
        --num_padding_at_beginning 0 --per_device_train_batch_size 1 --per_device_mini_train_batch_size 1 --ppo_epochs 2
        --max_prompt_seq_len 128 --actor_learning_rate 5e-4 --critic_learning_rate 5e-4 --gradient_accumulation_steps 4
        --deepspeed --actor_lora_dim 2 --actor_lora_module_name q_proj --critic_lora_dim 2
        --critic_lora_module_name q_proj,k_proj --only_optimize_lora --output_dir /tmp/rlhf/final""",
}
