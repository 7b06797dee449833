"""Answers to the six claims, in English and Chinese. tables.py fills in every figure.

{acc NAME}        accuracy with its interval; with several seeds their mean
{auc NAME}        the same for the AUC (DeLong's interval)
{auc NAME WORDS}  AUC with other label words, from a row with --label-sets (Hanley and McNeil's)
{each NAME}       accuracy of each seed
{diff A B}        accuracy of A minus accuracy of B on the clean rows: paired interval, McNemar's p
                  of each seed
{aucdiff A B}     the same for the AUC, without a test
{off NAME}        share of generated answers without a label word
{said NAME WORDS} share of these answers that contain the words given here
{steps NAME}      training steps of the checkpoint that was evaluated (the better of two)
{moved NAME WHAT} how far token vectors moved, relative to their length
"""

# Claim, short answer for README.md, full answer for README.md of this directory.
ENGLISH = (
    (
        "A head on a frozen base fails (0.512).",
        "False: a linear probe on the frozen base reaches {acc head_only}. The diary's row "
        "measured the head of `lora_head`, moved to the base without LoRA.",
        "False. A linear probe on the frozen base reaches {acc head_only}; compared with "
        "zero-shot: {diff head_only zero_shot}. With the layer chosen on the held-out part it "
        "reaches {acc head_only-best}, with mean pooling {acc head_only-mean}, on the 1.5B model "
        "{acc 1.5b/head_only}. The diary's row measured something else: the head of `lora_head`, "
        "moved to the base without LoRA. This loses accuracy here too; compared with `lora_head`: "
        "{diff transplanted_head lora_head}. How much depends on the seed: the three seeds reach "
        "{each transplanted_head}; the last is as close to chance as the diary's. On the 1.5B "
        "model it stays far from chance ({each 1.5b/transplanted_head}); compared with "
        "`lora_head`: {diff 1.5b/transplanted_head 1.5b/lora_head}. On the 0.5B model the "
        "threshold suffers more than the ranking: the AUC is still {auc transplanted_head}. A "
        "head that took too few steps at this learning rate also fails: `lora_head` trained on 50 "
        "rows ({steps lora_head-n50} steps) reaches {acc lora_head-n50}; a probe solved on the "
        "same rows reaches {acc head_only-n50}. Not tested: the diary's own model and head, whose "
        "AUC fell as well.",
    ),
    (
        "LoRA changes the distribution of the hidden states; head and LoRA cannot be separated.",
        "Half true: a head trained with LoRA does not fit the base without it, but a new probe on "
        "the hidden states after LoRA reaches {acc probe-of-lora_head}.",
        "Half true. The head trained with LoRA does not fit the base without LoRA; compared with "
        "a probe solved on that base: {diff transplanted_head head_only}. But the hidden states "
        "after LoRA do not need this one head: a new probe solved on them reaches "
        "{acc probe-of-lora_head}; compared with the head that was trained with LoRA: "
        "{diff probe-of-lora_head lora_head}. With the LoRA that label scoring trained (no head "
        "was trained with it), a probe reaches {acc probe-of-lora_label_scoring}. Both kinds of "
        "adapted states rank better than the base's: compared with the probe on the frozen base, "
        "the AUC differs by {aucdiff probe-of-lora_head head_only} and "
        "{aucdiff probe-of-lora_label_scoring head_only}. The same on the 1.5B model: the new "
        "probe reaches {acc 1.5b/probe-of-lora_head}; compared with the head that was trained "
        "with LoRA: {diff 1.5b/probe-of-lora_head 1.5b/lora_head}. Not tested: how far the states "
        "moved; this shows only what a linear head can read from them.",
    ),
    (
        "Label scoring beats the head by two points.",
        "False with 3,000 training rows: the difference from `lora_head` is "
        "{diff lora_label_scoring lora_head}.",
        "False with 3,000 training rows: compared with `lora_head` "
        "{diff lora_label_scoring lora_head}, on the 1.5B model "
        "{diff 1.5b/lora_label_scoring 1.5b/lora_head}; with all rows and two epochs (0.5B) "
        "{diff lora_label_scoring-all lora_head-all}. All three intervals exclude two points. "
        "With more rows and the second epoch label scoring and the head are better, but not "
        "significantly after correction for the number of tests: "
        "{diff lora_label_scoring-all lora_label_scoring} and {diff lora_head-all lora_head}. "
        "With 50 and 200 rows label scoring is far better than `lora_head`: "
        "{diff lora_label_scoring-n50 lora_head-n50} and "
        "{diff lora_label_scoring-n200 lora_head-n200}. But then the head is still close to "
        "chance, and label scoring is still close to zero-shot: "
        "{diff lora_label_scoring-n50 zero_shot} and {diff lora_label_scoring-n200 zero_shot}. "
        "With the same 200 rows it is worse than a probe: "
        "{diff lora_label_scoring-n200 head_only-n200}. The advantage of label scoring is a "
        "better start. Not tested: few rows and many epochs; all rows on the 1.5B model.",
    ),
    (
        "The choice of label words changes the zero-shot result.",
        "True: with 消极/积极 accuracy is {acc zero_shot-xiaoji}, because the threshold moves, "
        "hardly the ranking.",
        "True. With 消极/积极 accuracy is {acc zero_shot-xiaoji}; compared with 负面/正面: "
        "{diff zero_shot-xiaoji zero_shot}. The threshold moves; no change of the ranking was "
        "found: the AUC differs by {aucdiff zero_shot-xiaoji zero_shot}. 差/好 and 负向/正向 "
        "also rank worse: the AUC differs by {aucdiff zero_shot-chahao zero_shot} and "
        "{aucdiff zero_shot-xiang zero_shot}. The 1.5B model depends on the words as well: "
        "负向/正向, compared with 负面/正面: {diff 1.5b/zero_shot-xiang 1.5b/zero_shot}. After "
        "training, little of the difference remains: `lora_label_scoring` with 负向/正向 reaches "
        "{acc lora_label_scoring-xiang}; compared with 负面/正面: "
        "{diff lora_label_scoring-xiang lora_label_scoring}, on the 1.5B model "
        "{diff 1.5b/lora_label_scoring-xiang 1.5b/lora_label_scoring}. Neither is significant "
        "after correction for the number of tests. Not tested: which words are best; "
        "these four pairs were fixed in advance.",
    ),
    (
        "Training the embedding makes even a head without LoRA work, but by dragging the meaning "
        "of the label words, not by understanding.",
        "There is nothing to repair: with the embedding trained, a head without LoRA reaches "
        "{acc embeddings-head}, no significant difference from the probe on the frozen base.",
        "There is nothing to repair: with embedding and head trained, without LoRA, accuracy is "
        "{acc embeddings-head}; compared with the probe on the frozen base: "
        "{diff embeddings-head head_only}. Label scoring with only the embedding trained reaches "
        "{acc embeddings-words}; compared with LoRA: {diff embeddings-words lora_label_scoring} "
        "(both trained together: {acc embeddings-lora-words}). The label words' vectors did move: "
        "by {moved embeddings-words 负面} and {moved embeddings-words 正面} of their length (the "
        "other tokens of the training prompts by {moved embeddings-words others} on average). But "
        "most of the gain does not depend on them. When only these two vectors are set back to "
        "the base's, accuracy is still {acc embeddings-words-others}; compared with all trained "
        "vectors: {diff embeddings-words-others embeddings-words}. When only these two vectors "
        "are kept and all others are set back, accuracy is {acc embeddings-words-labels}; "
        "compared with zero-shot: {diff embeddings-words-labels zero_shot}. Label words that were "
        "not used in training also rank far better: the AUC of 负向/正向 rises from "
        "{auc zero_shot 负向,正向} to {auc embeddings-words 负向,正向}. Not tested: whether the "
        "model understands; accuracy cannot measure that.",
    ),
    (
        "Generating instead of scoring goes off track.",
        "With the plain prompt, {off zero_shot_generate} of the answers contain no label word. "
        "With a question in the model's chat markup the share is {off zero_shot_generate-chat}, "
        "but accuracy is only {acc zero_shot_generate-chat}.",
        "Literally true with the plain prompt: {off zero_shot_generate} of the answers contain "
        "neither 负面 nor 正面 in their first 16 tokens. But {said zero_shot_generate 消极,积极} "
        "of these answers say 积极 or 消极 instead. With a question in the model's own chat "
        "markup that names the two words, the share off track is {off zero_shot_generate-chat}. "
        "Accuracy is then {acc zero_shot_generate-chat}, about the same as when the same prompt "
        "is scored: {diff zero_shot_generate-chat zero_shot-chat}. But scoring this prompt is "
        "worse than scoring the plain prompt: {diff zero_shot-chat zero_shot}. Not tested: "
        "whether the markup or the question made the difference; random sampling (decoding was "
        "greedy).",
    ),
)
# Claim, full answer.
CHINESE = (
    (
        "在冻结的底座上，分类头行不通（0.512）。",
        "不成立。冻结底座上的线性探针准确率为 {acc head_only}，"
        "与零样本相比 {diff head_only zero_shot}；换用留出部分选出的层为 {acc head_only-best}，"
        "换用平均池化为 {acc head_only-mean}，换用 1.5B 模型为 {acc 1.5b/head_only}。"
        "日记里那一行量的是另一回事：把 `lora_head` 的分类头搬到没有 LoRA 的底座上。"
        "这样做在这里也会掉准确率，与 `lora_head` 相比 {diff transplanted_head lora_head}，"
        "掉多少要看随机种子：三个种子分别为 {each transplanted_head}，"
        "最后一个和日记里的一样接近随机猜测。"
        "在 1.5B 模型上则离随机猜测很远：{each 1.5b/transplanted_head}，"
        "与 `lora_head` 相比 {diff 1.5b/transplanted_head 1.5b/lora_head}。"
        "在 0.5B 模型上，问题更多出在阈值，而不是排序：AUC 仍有 {auc transplanted_head}。"
        "同样行不通的，还有在这个学习率下步数太少的分类头："
        "`lora_head` 只用 50 条训练、走 {steps lora_head-n50} 步，准确率为 {acc lora_head-n50}；"
        "用同样 50 条求解的探针为 {acc head_only-n50}。"
        "没有验证的是：日记自己的模型和分类头，其 AUC 也下降了。",
    ),
    (
        "LoRA 改变了隐状态的分布，分类头和 LoRA 拆不开。",
        "只对一半。和 LoRA 一起训练的分类头确实不适合没有 LoRA 的底座，"
        "不如直接在这个底座上求解的探针：{diff transplanted_head head_only}。"
        "但 LoRA 之后的隐状态并不是非这个分类头不可：在其上重新求解的探针准确率为 "
        "{acc probe-of-lora_head}，与一起训练的分类头相比 {diff probe-of-lora_head lora_head}；"
        "换成标签打分训练出的 LoRA（从未训练过分类头），探针为 "
        "{acc probe-of-lora_label_scoring}。这两种 LoRA 之后的隐状态都比底座的更利于排序："
        "与冻结底座上的探针相比，AUC 分别差 {aucdiff probe-of-lora_head head_only} 和 "
        "{aucdiff probe-of-lora_label_scoring head_only}。"
        "1.5B 模型也是如此：重新求解的探针为 {acc 1.5b/probe-of-lora_head}，"
        "与一起训练的分类头相比 {diff 1.5b/probe-of-lora_head 1.5b/lora_head}。"
        "没有验证的是：隐状态移动了多远；这里只看线性分类头能从中读出什么。",
    ),
    (
        "标签打分比分类头高两个百分点。",
        "用 3,000 条训练时不成立：与 `lora_head` 相比 {diff lora_label_scoring lora_head}，"
        "在 1.5B 模型上为 {diff 1.5b/lora_label_scoring 1.5b/lora_head}，"
        "用全部数据训练两个 epoch 时（0.5B）为 {diff lora_label_scoring-all lora_head-all}，"
        "三个区间都不含两个百分点。数据更多、多训练一个 epoch，标签打分和分类头都有提高，"
        "但按检验次数校正后都不显著："
        "{diff lora_label_scoring-all lora_label_scoring} 和 {diff lora_head-all lora_head}。"
        "只用 50 条和 200 条时，它比 `lora_head` 高得多："
        "{diff lora_label_scoring-n50 lora_head-n50} 和 "
        "{diff lora_label_scoring-n200 lora_head-n200}，但那时分类头几乎还在随机猜测，"
        "标签打分也几乎还停在零样本的水平：与零样本相比 "
        "{diff lora_label_scoring-n50 zero_shot} 和 {diff lora_label_scoring-n200 zero_shot}；"
        "同样用 200 条训练，它不如探针：{diff lora_label_scoring-n200 head_only-n200}。"
        "标签打分的优势在于起点更高。没有验证的是：数据少而 epoch 多时会怎样；"
        "1.5B 模型用全部数据时会怎样。",
    ),
    (
        "标签词的选择会左右零样本的结果。",
        "成立。用“消极/积极”时准确率为 {acc zero_shot-xiaoji}，与用“负面/正面”相比 "
        "{diff zero_shot-xiaoji zero_shot}；变的是阈值，没有发现排序能力有变化，AUC 之差为 "
        "{aucdiff zero_shot-xiaoji zero_shot}。“差/好”和“负向/正向”连排序也更差，AUC 分别差 "
        "{aucdiff zero_shot-chahao zero_shot} 和 {aucdiff zero_shot-xiang zero_shot}。"
        "1.5B 模型同样受标签词影响：改用“负向/正向”，与用“负面/正面”相比 "
        "{diff 1.5b/zero_shot-xiang 1.5b/zero_shot}。"
        "训练之后差别所剩无几：`lora_label_scoring` 用“负向/正向”时准确率为 "
        "{acc lora_label_scoring-xiang}，与用“负面/正面”相比 "
        "{diff lora_label_scoring-xiang lora_label_scoring}，在 1.5B 模型上为 "
        "{diff 1.5b/lora_label_scoring-xiang 1.5b/lora_label_scoring}，按检验次数校正后都不显著。"
        "没有验证的是：哪些词最好；这四对词是事先定好的。",
    ),
    (
        "训练词向量（embedding）能让没有 LoRA 的分类头也活过来，"
        "但靠的是拖动标签词的含义，而不是理解。",
        "本来就没有什么需要“活过来”：不用 LoRA、只训练词向量和分类头，准确率为 "
        "{acc embeddings-head}，与冻结底座上的探针相比 {diff embeddings-head head_only}。"
        "标签打分不用 LoRA、只训练词向量，准确率为 {acc embeddings-words}，与用 LoRA 时相比 "
        "{diff embeddings-words lora_label_scoring}（两者一起训练：{acc embeddings-lora-words}）。"
        "标签词的向量确实被拖动了：“负面”和“正面”的移动量分别是自身长度的 "
        "{moved embeddings-words 负面} 和 {moved embeddings-words 正面} 倍"
        "（训练提示词里的其他 token 平均 {moved embeddings-words others} 倍），"
        "但提升主要不靠它们：把这两个词的向量还原成底座的，准确率仍有 "
        "{acc embeddings-words-others}，与不还原时相比 "
        "{diff embeddings-words-others embeddings-words}；"
        "反过来，只保留这两个词训练后的向量、其余全部还原，准确率为 "
        "{acc embeddings-words-labels}，与零样本相比 {diff embeddings-words-labels zero_shot}。"
        "没有用来训练的标签词，排序也好了很多：“负向/正向”的 AUC 从 "
        "{auc zero_shot 负向,正向} 升到 {auc embeddings-words 负向,正向}。"
        "没有验证的是：模型是否“理解”，准确率量不出这一点。",
    ),
    (
        "不打分而让模型直接生成，会跑题。",
        "用普通提示词时，字面上成立：有 {off zero_shot_generate} 的回答在前 16 个 token 里"
        "既没有“负面”也没有“正面”；但这些回答里有 {said zero_shot_generate 消极,积极} "
        "改说了“积极”或“消极”。改用模型自带的对话格式（chat template）提问并点明这两个词，"
        "跑题的比例为 {off zero_shot_generate-chat}，准确率为 {acc zero_shot_generate-chat}，"
        "与对同一提示词打分几乎一样：{diff zero_shot_generate-chat zero_shot-chat}；"
        "但对这个提示词打分，不如对普通提示词打分：{diff zero_shot-chat zero_shot}。"
        "没有验证的是：起作用的是对话格式还是问句；换成随机采样会怎样（这里用的是贪心解码）。",
    ),
)
