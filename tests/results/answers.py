"""What the numbers say of six claims, in English and Chinese; tables.py fills in every figure.

{acc NAME}       accuracy with its interval; of several seeds the mean's
{auc NAME}       likewise AUC
{auc NAME WORDS} AUC with other label words, from a row with --label-sets
{diff A B}       accuracy of A minus that of B on the clean rows: paired interval, McNemar's p
{off NAME}       share of answers without a label word, with its interval
"""

# Claim, then what the numbers show and what they do not.
ENGLISH = (
    (
        "A head on a frozen base fails (0.512).",
        "No. A probe on the frozen base gets {acc head_only}, against zero-shot "
        "{diff head_only zero_shot}. The diary's row was another thing: `lora_head`'s head moved "
        "onto the bare base. Here that loses, {diff transplanted_head lora_head}, but does not "
        "collapse: {acc transplanted_head}.",
    ),
    (
        "LoRA changes the distribution of the hidden states, and head and LoRA cannot be taken "
        "apart.",
        "Half of it. That head does not fit the bare base "
        "({diff lora_head transplanted_head}). But LoRA's states need no head of their own "
        "making: a probe solved anew on them gets {acc probe-of-lora_head}, against the head that "
        "was trained with them {diff probe-of-lora_head lora_head}; and on the base that label "
        "scoring adapted, where no head was ever trained, {acc probe-of-lora_label_scoring}.",
    ),
    (
        "Label scoring beats the head, by two points.",
        "Not here: {acc lora_label_scoring} against {acc lora_head}, a difference of "
        "{diff lora_label_scoring lora_head}, whose interval leaves two points out.",
    ),
    (
        "The choice of label words shifts zero-shot.",
        "Yes. With 消极/积极 it is the threshold alone, not the ranking: {acc zero_shot-xiaoji}, "
        "against 负面/正面 {diff zero_shot-xiaoji zero_shot}, at an AUC of {auc zero_shot-xiaoji} "
        "beside {auc zero_shot}. 差/好 ({auc zero_shot-chahao}) and 负向/正向 "
        "({auc zero_shot-xiang}) rank worse too.",
    ),
    (
        "Training the embedding would revive even a bare head, by dragging the label's meaning "
        "rather than by understanding.",
        "There is nothing to revive: a head with the embedding trained under it, without LoRA, "
        "gets {acc embeddings-head}, against the probe on the frozen base "
        "{diff embeddings-head head_only}. Nor is it the label's vector. Label scoring with the "
        "embedding alone trained gets {acc embeddings-words}, against LoRA "
        "{diff embeddings-words lora_label_scoring}; the vectors of 负面 and 正面 moved little "
        "more than those of the texts' own tokens (table above); and words that were never trained "
        "on rank far better as well: 负向/正向 from an AUC of {auc zero_shot 负向/正向} to "
        "{auc embeddings-words 负向/正向}.",
    ),
    (
        "Generating instead of scoring goes off track.",
        "With the plain prompt, yes: {off zero_shot_generate} of the answers hold no label word. "
        "With a question in the model's own markup {off zero_shot_generate-chat} do, and accuracy "
        "is {acc zero_shot_generate-chat}, against scoring the same prompt "
        "{diff zero_shot_generate-chat zero_shot-chat}: there both say the same.",
    ),
)
CHINESE = (
    (
        "冻结底座上的分类头会失败（0.512）。",
        "不成立。冻结底座上的线性探针得到 {acc head_only}，"
        "与零样本相比 {diff head_only zero_shot}。日记里那一行量的是另一件事：把 "
        "`lora_head` 的头搬到没有 LoRA 的底座上。在这里它有损失，"
        "{diff transplanted_head lora_head}，但没有崩溃：{acc transplanted_head}。",
    ),
    (
        "LoRA 改变了隐状态的分布，头和 LoRA 不能分开。",
        "只对一半。那个头确实不适合原来的底座（{diff lora_head transplanted_head}）。但 LoRA 之后的"
        "状态并不离不开它：在其上重新求解的探针得到 {acc probe-of-lora_head}，与一起训练的头相比 "
        "{diff probe-of-lora_head lora_head}；在只按标签词打分训练过、从未有过头的底座上，"
        "探针得到 {acc probe-of-lora_label_scoring}。",
    ),
    (
        "标签打分比分类头高两个百分点。",
        "在这里不成立：{acc lora_label_scoring} 对 {acc lora_head}，相差 "
        "{diff lora_label_scoring lora_head}，区间不含两个百分点。",
    ),
    (
        "标签词的选择会移动零样本结果。",
        "成立。消极/积极移动的只是阈值而不是排序：{acc zero_shot-xiaoji}，与 负面/正面 相比 "
        "{diff zero_shot-xiaoji zero_shot}，而 AUC 是 {auc zero_shot-xiaoji} 对 {auc zero_shot}。"
        "差/好（{auc zero_shot-chahao}）和 负向/正向（{auc zero_shot-xiang}）连排序也更差。",
    ),
    (
        "训练词向量能让光秃秃的头也活过来，但靠的是拖动标签词的含义，而不是理解。",
        "本来就没有什么需要“复活”：只训练词向量和头、不用 LoRA，得到 {acc embeddings-head}；"
        "与冻结底座上的探针相比 {diff embeddings-head head_only}。也不是标签词的向量在起作用："
        "只训练词向量的标签打分得到 {acc embeddings-words}，与 LoRA 相比 "
        "{diff embeddings-words lora_label_scoring}；负面、正面的向量只比评论里其他词的"
        "向量多动了一点（见英文部分的表）；从未训练过的标签词排序也好了很多：负向/正向的 AUC 从 "
        "{auc zero_shot 负向/正向} 到 {auc embeddings-words 负向/正向}。",
    ),
    (
        "让模型生成而不是打分会跑题。",
        "用普通提示词时成立：{off zero_shot_generate} 的回答里没有标签词。用模型自己的格式提问时"
        "是 {off zero_shot_generate-chat}，准确率 {acc zero_shot_generate-chat}，"
        "与对同一提示词打分相比 "
        "{diff zero_shot_generate-chat zero_shot-chat}：两者结果一样。",
    ),
)
