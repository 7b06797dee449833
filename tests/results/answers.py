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
        "{diff head_only zero_shot}; with the layer that the held-out part chose "
        "{acc head_only-best}, with mean pooling {acc head_only-mean}, on 1.5B "
        "{acc 1.5b/head_only}. The diary's row was another thing: `lora_head`'s head moved onto "
        "the bare base. Here that loses, {diff transplanted_head lora_head}, but does not "
        "collapse: {acc transplanted_head}. What does fail is a head that has taken few steps: "
        "`lora_head` on 50 rows (6 steps) gets {acc lora_head-n50}, a probe solved on the same "
        "rows {acc head_only-n50}. Not shown: why the diary's head collapsed where this one did "
        "not.",
    ),
    (
        "LoRA changes the distribution of the hidden states, and head and LoRA cannot be taken "
        "apart.",
        "Half of it. That head does not fit the bare base, "
        "{diff transplanted_head lora_head}. But LoRA's states need no head of their own "
        "making: a probe solved anew on them gets {acc probe-of-lora_head}, against the head that "
        "was trained with them {diff probe-of-lora_head lora_head}; and on the base that label "
        "scoring adapted, where no head was ever trained, {acc probe-of-lora_label_scoring}. "
        "Not shown: how far the states moved; only what a linear head can read in them.",
    ),
    (
        "Label scoring beats the head, by two points.",
        "Not with 3,000 rows: {acc lora_label_scoring} against {acc lora_head}, a difference of "
        "{diff lora_label_scoring lora_head}, whose interval leaves two points out. With few rows "
        "it does, since it starts from zero-shot and a head from chance: "
        "{diff lora_label_scoring-n50 lora_head-n50} with 50 rows and "
        "{diff lora_label_scoring-n200 lora_head-n200} with 200, but "
        "{diff lora_label_scoring-n800 lora_head-n800} with 800; and a probe, which is solved and "
        "not stepped towards, has no such weakness. Not shown: more than one epoch, where few rows "
        "would also give many steps.",
    ),
    (
        "The choice of label words shifts zero-shot.",
        "Yes. With 消极/积极 it is the threshold alone, not the ranking: {acc zero_shot-xiaoji}, "
        "against 负面/正面 {diff zero_shot-xiaoji zero_shot}, at an AUC of {auc zero_shot-xiaoji} "
        "beside {auc zero_shot}. 差/好, AUC {auc zero_shot-chahao}, and 负向/正向, "
        "{auc zero_shot-xiang}, rank worse too. Training leaves little of that: "
        "`lora_label_scoring` with 负向/正向 gets {acc lora_label_scoring-xiang}, against "
        "负面/正面 {diff lora_label_scoring-xiang lora_label_scoring}, which does not stand up to "
        "the number of tests. Not shown: which words are "
        "best; these four pairs were fixed beforehand.",
    ),
    (
        "Training the embedding would revive even a bare head, by dragging the label's meaning "
        "rather than by understanding.",
        "There is nothing to revive: a head with the embedding trained under it, without LoRA, "
        "gets {acc embeddings-head}, against the probe on the frozen base "
        "{diff embeddings-head head_only}. Nor is it the label's vector. Label scoring with the "
        "embedding alone trained gets {acc embeddings-words}, against LoRA "
        "{diff embeddings-words lora_label_scoring} (both trained together: "
        "{acc embeddings-lora-words}); the vectors of 负面 and 正面 moved little more than those "
        "of the texts' own tokens (table above); and words that were never trained on rank far "
        "better as well: 负向/正向 from an AUC of {auc zero_shot 负向/正向} to "
        "{auc embeddings-words 负向/正向}. Not shown: understanding, which no accuracy measures; "
        "only that what was learnt is not tied to the two words.",
    ),
    (
        "Generating instead of scoring goes off track.",
        "With the plain prompt, yes: {off zero_shot_generate} of the answers hold no label word. "
        "With a question in the model's own markup {off zero_shot_generate-chat} do, and accuracy "
        "is {acc zero_shot_generate-chat}, against scoring the same prompt "
        "{diff zero_shot_generate-chat zero_shot-chat}: there both say the same. Not shown: other "
        "questions, or sampled text; decoding was greedy.",
    ),
)
CHINESE = (
    (
        "冻结底座上的分类头会失败（0.512）。",
        "不成立。冻结底座上的线性探针得到 {acc head_only}，"
        "与零样本相比 {diff head_only zero_shot}；由留出部分选层得到 {acc head_only-best}，"
        "平均池化得到 {acc head_only-mean}，在 1.5B 上得到 {acc 1.5b/head_only}。"
        "日记里那一行量的是另一件事：把 "
        "`lora_head` 的头搬到没有 LoRA 的底座上。在这里它有损失，"
        "{diff transplanted_head lora_head}，但没有崩溃：{acc transplanted_head}。"
        "真正失败的是只走了几步的头：`lora_head` 用 50 行（6 步）得到 {acc lora_head-n50}，"
        "在同样这些行上直接求解的探针得到 {acc head_only-n50}。没有说明的是：日记里的头为什么崩溃，"
        "而这里没有。",
    ),
    (
        "LoRA 改变了隐状态的分布，头和 LoRA 不能分开。",
        "只对一半。那个头确实不适合原来的底座，{diff transplanted_head lora_head}。但 LoRA 之后的"
        "状态并不离不开它：在其上重新求解的探针得到 {acc probe-of-lora_head}，与一起训练的头相比 "
        "{diff probe-of-lora_head lora_head}；在只按标签词打分训练过、从未有过头的底座上，"
        "探针得到 {acc probe-of-lora_label_scoring}。没有说明的是：隐状态移动了多远；"
        "这里只看线性头能从中读出什么。",
    ),
    (
        "标签打分比分类头高两个百分点。",
        "用 3,000 行时不成立：{acc lora_label_scoring} 对 {acc lora_head}，相差 "
        "{diff lora_label_scoring lora_head}，区间不含两个百分点。行数少时成立，"
        "因为它从零样本出发，而头从瞎猜出发：50 行时 "
        "{diff lora_label_scoring-n50 lora_head-n50}，200 行时 "
        "{diff lora_label_scoring-n200 lora_head-n200}，800 行时则是 "
        "{diff lora_label_scoring-n800 lora_head-n800}；直接求解的探针没有这个弱点。"
        "没有说明的是：训练多个 epoch 时会怎样，那时行数少也能走很多步。",
    ),
    (
        "标签词的选择会移动零样本结果。",
        "成立。消极/积极移动的只是阈值而不是排序：{acc zero_shot-xiaoji}，与 负面/正面 相比 "
        "{diff zero_shot-xiaoji zero_shot}，而 AUC 是 {auc zero_shot-xiaoji} 对 {auc zero_shot}。"
        "差/好（AUC {auc zero_shot-chahao}）和 负向/正向（{auc zero_shot-xiang}）连排序也更差。"
        "训练之后差别所剩无几：`lora_label_scoring` 用 负向/正向 得到 "
        "{acc lora_label_scoring-xiang}，与 负面/正面 相比 "
        "{diff lora_label_scoring-xiang lora_label_scoring}，考虑到检验的个数不算显著。"
        "没有说明的是：哪些词最好；"
        "这四对是事先定下的。",
    ),
    (
        "训练词向量能让光秃秃的头也活过来，但靠的是拖动标签词的含义，而不是理解。",
        "本来就没有什么需要“复活”：只训练词向量和头、不用 LoRA，得到 {acc embeddings-head}；"
        "与冻结底座上的探针相比 {diff embeddings-head head_only}。也不是标签词的向量在起作用："
        "只训练词向量的标签打分得到 {acc embeddings-words}，与 LoRA 相比 "
        "{diff embeddings-words lora_label_scoring}（两者一起训练：{acc embeddings-lora-words}）；"
        "负面、正面的向量只比评论里其他词的"
        "向量多动了一点（见英文部分的表）；从未训练过的标签词排序也好了很多：负向/正向的 AUC 从 "
        "{auc zero_shot 负向/正向} 到 {auc embeddings-words 负向/正向}。没有说明的是：“理解”，"
        "准确率量不出它；只能说学到的东西不限于这两个词。",
    ),
    (
        "让模型生成而不是打分会跑题。",
        "用普通提示词时成立：{off zero_shot_generate} 的回答里没有标签词。用模型自己的格式提问时"
        "是 {off zero_shot_generate-chat}，准确率 {acc zero_shot_generate-chat}，"
        "与对同一提示词打分相比 "
        "{diff zero_shot_generate-chat zero_shot-chat}：两者结果一样。没有说明的是：换一种问法，"
        "或随机采样生成；这里是贪心解码。",
    ),
)
