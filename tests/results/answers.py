"""What the numbers say of six claims, in English and Chinese; tables.py fills in every figure.

{acc NAME}        accuracy with its interval; of several seeds the mean's
{auc NAME}        likewise AUC
{auc NAME WORDS}  AUC with other label words, from a row with --label-sets
{each NAME}       accuracy of each seed
{diff A B}        accuracy of A minus that of B, clean rows: paired interval, McNemar's p by seed
{aucdiff A B}     the same of AUC, without a test
{off NAME}        share of generated answers without a label word
{said NAME WORDS} share of those that hold these other words
{steps NAME}      steps that were taken
{moved NAME WHAT} how far token vectors went, in parts of their length
"""

# Claim, then what the numbers show and what they do not.
ENGLISH = (
    (
        "A head on a frozen base fails (0.512).",
        "No. A probe on the frozen base gets {acc head_only}, against zero-shot "
        "{diff head_only zero_shot}; with the layer that the held-out part chose "
        "{acc head_only-best}, with mean pooling {acc head_only-mean}, on 1.5B "
        "{acc 1.5b/head_only}. The diary's row was another thing: `lora_head`'s head moved onto "
        "the bare base. That loses here too, {diff transplanted_head lora_head}, and how much is a "
        "matter of the seed: {each transplanted_head}, the last as near to chance as the diary's. "
        "It is the threshold more than the ranking: AUC {auc transplanted_head}. What also fails "
        "is a head that has taken few steps at this learning rate: `lora_head` on 50 rows, "
        "{steps lora_head-n50} steps, gets {acc lora_head-n50}, a probe solved on the same rows "
        "{acc head_only-n50}. Not tested: the diary's own model and head, whose AUC fell as well.",
    ),
    (
        "LoRA changes the distribution of the hidden states, and head and LoRA cannot be taken "
        "apart.",
        "Half of it. The head trained with LoRA does not fit the bare base, where a head of its "
        "own would do better: {diff transplanted_head head_only}. But LoRA's states need no head "
        "of their own making: a probe solved anew on them gets {acc probe-of-lora_head}, against "
        "the head that was trained with them {diff probe-of-lora_head lora_head}; on the base that "
        "label scoring adapted, where no head was ever trained, {acc probe-of-lora_label_scoring}. "
        "Either way LoRA's states rank better than the base's: AUC "
        "{aucdiff probe-of-lora_head head_only} and "
        "{aucdiff probe-of-lora_label_scoring head_only}. Not tested: how far the states moved; "
        "only what a linear head can read in them.",
    ),
    (
        "Label scoring beats the head, by two points.",
        "Not with 3,000 rows: {diff lora_label_scoring lora_head}, an interval that leaves two "
        "points out. With 50 and 200 rows it beats `lora_head` by far, "
        "{diff lora_label_scoring-n50 lora_head-n50} and "
        "{diff lora_label_scoring-n200 lora_head-n200}, but that is a head which has hardly left "
        "chance; label scoring has then hardly left zero-shot, "
        "{diff lora_label_scoring-n50 zero_shot} and {diff lora_label_scoring-n200 zero_shot}, and "
        "a probe on the same 200 rows is ahead of it: it is {diff lora_label_scoring-n200 "
        "head_only-n200}. What label scoring has is a better start. Not tested: more than one "
        "epoch, where few rows would also give many steps.",
    ),
    (
        "The choice of label words shifts zero-shot.",
        "Yes. With 消极/积极 accuracy is {acc zero_shot-xiaoji}, against 负面/正面 "
        "{diff zero_shot-xiaoji zero_shot}; that is the threshold alone and not the ranking, whose "
        "AUC differs by {aucdiff zero_shot-xiaoji zero_shot}. 差/好, "
        "{aucdiff zero_shot-chahao zero_shot}, and 负向/正向, {aucdiff zero_shot-xiang zero_shot}, "
        "rank worse too. Training leaves little of that: `lora_label_scoring` with 负向/正向 gets "
        "{acc lora_label_scoring-xiang}, against 负面/正面 "
        "{diff lora_label_scoring-xiang lora_label_scoring}, which does not stand up to the number "
        "of tests. Not tested: which words are best; these four pairs were fixed beforehand.",
    ),
    (
        "Training the embedding would revive even a bare head, by dragging the label's meaning "
        "rather than by understanding.",
        "There is nothing to revive: a head with the embedding trained under it, without LoRA, "
        "gets {acc embeddings-head}, against the probe on the frozen base "
        "{diff embeddings-head head_only}. Label scoring with the embedding alone trained gets "
        "{acc embeddings-words}, against LoRA {diff embeddings-words lora_label_scoring} (both "
        "trained together: {acc embeddings-lora-words}). The label words' vectors were dragged, by "
        "{moved embeddings-words 负面} and {moved embeddings-words 正面} of their length (the "
        "texts' own tokens by {moved embeddings-words others}), but little of the gain hangs on "
        "them: set back to the base's they leave {acc embeddings-words-others}, against all "
        "vectors {diff embeddings-words-others embeddings-words}; they alone, on the base, make "
        "{acc embeddings-words-labels}, against zero-shot "
        "{diff embeddings-words-labels zero_shot}. And words that were never "
        "trained on rank far better as well: 负向/正向 from an AUC of {auc zero_shot 负向,正向} to "
        "{auc embeddings-words 负向,正向}. Not tested: understanding, which no accuracy measures.",
    ),
    (
        "Generating instead of scoring goes off track.",
        "By the letter, with the plain prompt: {off zero_shot_generate} of the answers hold "
        "neither 负面 nor 正面 in their first 16 tokens; but {said zero_shot_generate 消极,积极} "
        "of those say 积极 or 消极 instead. Where a question in the model's own markup names the "
        "two words, {off zero_shot_generate-chat} do, and accuracy is "
        "{acc zero_shot_generate-chat}, as by scoring that prompt, "
        "{diff zero_shot_generate-chat zero_shot-chat}, but worse than "
        "by scoring the plain one: {diff zero_shot-chat zero_shot}. Not tested: whether the markup "
        "or the question did it; sampled text, since decoding was greedy.",
    ),
)
CHINESE = (
    (
        "冻结底座上的分类头会失败（0.512）。",
        "不成立。冻结底座上的线性探针得到 {acc head_only}，"
        "与零样本相比 {diff head_only zero_shot}；由留出部分选层得到 {acc head_only-best}，"
        "平均池化得到 {acc head_only-mean}，在 1.5B 上得到 {acc 1.5b/head_only}。"
        "日记里那一行量的是另一件事：把 `lora_head` 的头搬到没有 LoRA 的底座上。"
        "在这里准确率也下降，{diff transplanted_head lora_head}，降多少取决于随机种子："
        "{each transplanted_head}，最后一个和日记里一样接近随机。"
        "丢掉的主要是阈值而不是排序：AUC 仍有 {auc transplanted_head}。"
        "同样失败的还有在这个学习率下训练步数太少的头："
        "`lora_head` 用 50 行、{steps lora_head-n50} 步得到 {acc lora_head-n50}，"
        "在同样这些行上直接求解的探针得到 {acc head_only-n50}。"
        "这些数字没有检验：日记自己的模型和头，那里连 AUC 也降了。",
    ),
    (
        "LoRA 改变了隐状态的分布，头和 LoRA 不能分开。",
        "只对一半。和 LoRA 一起训练的头确实不适合原来的底座，不如底座自己的探针："
        "{diff transplanted_head head_only}。但 LoRA 之后的状态并不依赖这个头：在其上重新求解的探针"
        "得到 {acc probe-of-lora_head}，与一起训练的头相比 {diff probe-of-lora_head lora_head}；"
        "在只按标签词打分训练过、从未有过头的底座上，探针得到 "
        "{acc probe-of-lora_label_scoring}。无论怎样训练，LoRA 之后的状态都比底座的更利于排序："
        "AUC 差 "
        "{aucdiff probe-of-lora_head head_only} 和 "
        "{aucdiff probe-of-lora_label_scoring head_only}。这些数字没有检验：隐状态移动了多远；"
        "这里只看线性头能从中读出什么。",
    ),
    (
        "标签打分比分类头高两个百分点。",
        "用 3,000 行时不成立：{diff lora_label_scoring lora_head}，区间不含两个百分点。"
        "用 50 行和 200 行时，它比 `lora_head` 高很多："
        "{diff lora_label_scoring-n50 lora_head-n50} 和 "
        "{diff lora_label_scoring-n200 lora_head-n200}，但那时的头几乎还在随机猜测，"
        "标签打分也几乎还是零样本："
        "{diff lora_label_scoring-n50 zero_shot} 和 {diff lora_label_scoring-n200 zero_shot}；"
        "在同样 200 行上，它不如探针：{diff lora_label_scoring-n200 head_only-n200}。"
        "标签打分的长处是起点更高。这些数字没有检验：训练多个 epoch 时会怎样，"
        "那时行数少也能走很多步。",
    ),
    (
        "标签词的选择会移动零样本结果。",
        "成立。用 消极/积极 时准确率是 {acc zero_shot-xiaoji}，与 负面/正面 相比 "
        "{diff zero_shot-xiaoji zero_shot}；移动的只是阈值而不是排序，AUC 只差 "
        "{aucdiff zero_shot-xiaoji zero_shot}。差/好（{aucdiff zero_shot-chahao zero_shot}）和 "
        "负向/正向（{aucdiff zero_shot-xiang zero_shot}）连排序也更差。"
        "训练之后差别所剩无几：`lora_label_scoring` 用 负向/正向 得到 "
        "{acc lora_label_scoring-xiang}，与 负面/正面 相比 "
        "{diff lora_label_scoring-xiang lora_label_scoring}，考虑到检验的个数不算显著。"
        "这些数字没有检验：哪些词最好；这四对是事先定下的。",
    ),
    (
        "训练词向量能让光秃秃的头也活过来，但靠的是拖动标签词的含义，而不是理解。",
        "本来就没有什么需要“复活”：只训练词向量和头、不用 LoRA，得到 {acc embeddings-head}；"
        "与冻结底座上的探针相比 {diff embeddings-head head_only}。"
        "只训练词向量的标签打分得到 {acc embeddings-words}，与 LoRA 相比 "
        "{diff embeddings-words lora_label_scoring}（两者一起训练：{acc embeddings-lora-words}）。"
        "标签词的向量确实被拖动了，移动了自身长度的 {moved embeddings-words 负面} 和 "
        "{moved embeddings-words 正面}（评论里其他词是 {moved embeddings-words others}），"
        "但提高主要不靠它们：把这两个向量放回底座的值，仍有 {acc embeddings-words-others}，"
        "与全部向量相比 {diff embeddings-words-others embeddings-words}；"
        "只换上这两个向量，底座得到 {acc embeddings-words-labels}，与零样本相比 "
        "{diff embeddings-words-labels zero_shot}。"
        "从未训练过的标签词排序也好了很多：负向/正向的 AUC 从 "
        "{auc zero_shot 负向,正向} 到 {auc embeddings-words 负向,正向}。这些数字没有检验："
        "“理解”，准确率量不出它。",
    ),
    (
        "让模型生成而不是打分会跑题。",
        "用普通提示词时，字面上成立：{off zero_shot_generate} 的回答在前 16 个 token 里既没有 负面 "
        "也没有 正面；但其中 {said zero_shot_generate 消极,积极} 说的是 积极 或 消极。"
        "用模型自己的格式提问并点明这两个词时是 {off zero_shot_generate-chat}，"
        "准确率 {acc zero_shot_generate-chat}，与对同一提示词打分一样，"
        "{diff zero_shot_generate-chat zero_shot-chat}，但不如对普通提示词打分："
        "{diff zero_shot-chat zero_shot}。这些数字没有检验：起作用的是格式还是问句；"
        "随机采样又会怎样，这里是贪心解码。",
    ),
)
