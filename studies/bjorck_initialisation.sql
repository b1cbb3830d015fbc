-- Queries of studies/bjorck_initialisation.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings. A query that
-- selects from another of this file gets it as a CTE.

-- name: settings
-- One row per trial with a result: what it is in words, and whether it is one of the two that the paper compares; `papers`
-- where its numbers can be held against the paper's. A setting with several trials a seed, because another field was given
-- several values, is left out: these are no repeats.
select
    trial,
    seed,
    lr,
    batch,
    if(norm = 'none', 'no norm', norm || ' norm')
    || case when placement in ('every', 'none') then '' when placement = 'last' then ' at the end' else ', ' || placement end
    || if(output_bias = 'even', ', classes evened', '')
    || if(weight_init = 'glorot_normal', '', ', ' || replace(weight_init, '_', ' ')) as setting,
    setting in ('no norm', 'batch norm') as compared,
    data = 'cifar10'
    and label_noise = 0
    and network = 'resnet'
    and depth = 110
    and width = 1
    and batch = 128
    and norm_batch = batch
    and trainable = 'all'
    and augmentation = 'flip_shift'
    and norm_init = 'ones'
    and momentum = 0.9
    and weight_decay = 0.0005
    and warmup = 0
    and affine = 'both'
    and precision = 'fp32'
    and lr = if(norm = 'none', 0.0001, 0.1) as papers
from chosen
join trials using (trial)
qualify count(*) over (partition by setting, seed) = 1
order by setting, seed

-- name: first_seed
-- One row per setting: the trial of its first seed, for pictures of a single network.
select setting, arg_min(trial, seed) as trial
from settings
group by setting

-- --- Figure 2: the gradient of a middle layer, and its tails -------------------------------------------------------

-- name: gradient_of_layer_55
-- One row per setting that the paper compares and interval: share of the weights of layer 55, first seed.
select
    setting,
    low,
    high,
    weights / all_weights as share
from gradient_histogram
join first_seed using (trial)
where layer_index = 55 and step = 0 and setting in ('no norm', 'batch norm')
order by setting desc, low

-- name: size_of_gradients
-- One row per setting and layer: root mean square of the gradient, geometric mean over seeds.
select setting, layer_index, exp(avg(ln(rms))) as rms, count(*) as n
from gradient
join settings using (trial)
where step = 0 and rms > 0
group by setting, layer_index
order by setting, layer_index

-- name: tails
-- One row per setting and layer: tail index of the gradient's magnitudes, over seeds.
select setting, layer_index, avg(hill) as hill, avg(kurtosis) as kurtosis, count(*) as n
from gradient
join settings using (trial)
where step = 0 and hill is not null
group by setting, layer_index
order by setting, layer_index

-- name: range_of_layer_55
-- One row per setting that the paper compares: largest magnitude of a gradient in layer 55, geometric mean over seeds.
with
-- one row per setting
over_seeds as (
    select
        setting,
        count(*) as n,
        avg(ln(largest)) as mean,
        stddev_samp(ln(largest)) / sqrt(count(*)) as error
    from gradient
    join settings using (trial)
    where step = 0 and layer_index = 55 and papers and compared
    group by setting
)

select setting, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)

-- name: decades_between_ranges
-- One row: decades between the largest gradients of layer 55 without and with batch norm, over seeds.
with
-- one row per seed
by_seed as (
    select
        seed,
        log10(max(largest) filter (where setting = 'no norm'))
            - log10(max(largest) filter (where setting = 'batch norm')) as decades
    from gradient
    join settings using (trial)
    where step = 0 and layer_index = 55 and papers
    group by seed
),

over_seeds as (
    -- one row
    select avg(decades) as measured, count(decades) as n, stddev_samp(decades) / sqrt(count(decades)) as error
    from by_seed
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)

-- name: shape_of_layer_55
-- One row per setting that the paper compares: kurtosis of the gradient of layer 55, over seeds.
with
-- one row per setting
over_seeds as (
    select setting, avg(kurtosis) as measured, count(*) as n, stddev_samp(kurtosis) / sqrt(count(*)) as error
    from gradient
    join settings using (trial)
    where step = 0 and layer_index = 55 and compared
    group by setting
)

select setting, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)

-- name: heavier_tails
-- One row: share of the layers but the output whose gradient has a larger kurtosis without batch norm than with it.
with
-- one row per layer: means over seeds
by_layer as (
    select
        layer_index,
        avg(kurtosis) filter (where setting = 'no norm') as without,
        avg(kurtosis) filter (where setting = 'batch norm') as with_norm,
        least(
            count(kurtosis) filter (where setting = 'no norm'), count(kurtosis) filter (where setting = 'batch norm')
        ) as n
    from gradient
    join settings using (trial)
    where step = 0 and layer <> 'output'
    group by layer_index
)

select avg((without > with_norm)::int) as measured, min(n) as n
from by_layer
where without is not null and with_norm is not null

-- --- Figure 3: the loss along the gradient --------------------------------------------------------------------------

-- name: loss_along_the_gradient
-- One row per setting that the paper compares, mini-batch and step size at which every seed was looked at, and no loss left
-- the numbers: loss over the loss before, geometric mean over seeds with their range.
select
    'mini-batch ' || (step + 1) as mini_batch,
    setting,
    length,
    exp(avg(ln(least(relative, 1e300)))) as relative,
    min(relative) as minimum,
    max(relative) as maximum,
    count(*) as n
from loss_along_gradient
join settings using (trial)
where compared and step in (0, 3, 6)
group by mini_batch, setting, length
qualify n = max(n) over (partition by mini_batch, setting) and maximum < 'infinity'::double
order by mini_batch, setting, length

-- name: crossings
-- One row per setting that the paper compares, mini-batch and level: the step size at which the loss along the gradient,
-- behind its minimum, first reaches this many times the loss before; between two step sizes it lies on a straight line in
-- logarithms. Over seeds, of those that reach it.
with
-- one row per trial and mini-batch: where the loss is least
least_loss as (
    select trial, step, arg_min(length, relative) as bottom
    from loss_along_gradient
    group by trial, step
),

-- one row per trial, mini-batch and step size behind the minimum, with its neighbour before
pairs as (
    select
        trial,
        step,
        ln(length) as x,
        lag(ln(length)) over (partition by trial, step order by length) as x_before,
        ln(least(relative, 1e30)) as y,
        lag(ln(least(relative, 1e30))) over (partition by trial, step order by length) as y_before
    from loss_along_gradient
    join least_loss using (trial, step)
    where length >= bottom
),

-- one row per trial, mini-batch and level that is reached
by_trial as (
    select trial, step, level, min(x_before + (x - x_before) * (ln(level) - y_before) / (y - y_before)) as x
    from pairs
    cross join (values (1.0), (1e3), (1e6)) as levels (level)
    where y_before < ln(level) and y >= ln(level)
    group by trial, step, level
),

-- one row per setting, mini-batch and level
over_seeds as (
    select setting, step + 1 as mini_batch, level, count(*) as n, avg(x) as mean, stddev_samp(x) / sqrt(count(*)) as error
    from by_trial
    join settings using (trial)
    where compared and papers
    group by all
)

select
    setting, mini_batch, level, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by setting, mini_batch, level

-- name: least_losses
-- One row per setting that the paper compares, mini-batch and reading: the least loss along the gradient over the loss before
-- ('loss'), and the step size where it is ('length').
with
-- one row per trial, mini-batch and reading
by_trial as (
    select trial, step, reading, ln(if(reading = 'loss', min(relative), arg_min(length, relative))) as x
    from loss_along_gradient
    cross join (values ('loss'), ('length')) as readings (reading)
    group by trial, step, reading
),

-- one row per setting, mini-batch and reading
over_seeds as (
    select
        setting, step + 1 as mini_batch, reading, count(*) as n, avg(x) as mean, stddev_samp(x) / sqrt(count(*)) as error
    from by_trial
    join settings using (trial)
    where compared and papers
    group by all
)

select
    setting, mini_batch, reading, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by setting, mini_batch, reading

-- name: loss_at_a_fifth
-- One row: with batch norm at mini-batch 7, the loss over the loss before at a step size of 0.215; geometric mean over
-- seeds. A loss that left the numbers counts as 1e30 times: without a number the claim would be left open.
with
-- one row per trial
by_trial as (
    select trial, arg_max(relative, length) as relative
    from loss_along_gradient
    join settings using (trial)
    where setting = 'batch norm' and papers and step = 6 and length < 0.22
    group by trial
)

select exp(avg(ln(least(relative, 1e30)))) as measured, count(*) as n
from by_trial

-- name: divergence_with_batch_norm
-- One row: of the step sizes up to 0.215 along the gradients of mini-batches 1, 4 and 7, how many multiply the loss by more
-- than 1,000 with batch norm; all seeds.
with
-- one row per trial that was read at all three
by_trial as (
    select trial, count(*) filter (where relative > 1e3 and length < 0.22) as diverged
    from loss_along_gradient
    join settings using (trial)
    where setting = 'batch norm' and papers and step in (0, 3, 6)
    group by trial
    having count(distinct step) = 3
)

select sum(diverged) as measured, count(*) as n
from by_trial
having n > 0

-- --- Figure 4: moments while an update diverges ---------------------------------------------------------------------

-- name: moments_while_diverging
-- One row per layer, moment, fraction of the step and channel: without norm, first seed.
select
    layer_index as layer,
    'layer ' || layer_index || ', ' || moment as panel,
    fraction,
    channel,
    if(moment = 'means', mean, variance) as reading
from moments_along_gradient
join first_seed using (trial)
cross join (values ('means'), ('variances')) as moments (moment)
where setting = 'no norm' and step = 0 and diverges
order by layer, moment, fraction, channel

-- name: explosion
-- One row: decades by which the largest channel mean of layer 80 exceeds that of layer 8 at the end of a diverging step,
-- without norm; over seeds.
with
-- one row per trial
by_trial as (
    select
        trial,
        log10(max(abs(mean)) filter (where layer_index = 80)) - log10(max(abs(mean)) filter (where layer_index = 8))
            as decades
    from moments_along_gradient
    join settings using (trial)
    where setting = 'no norm' and papers and step = 0 and diverges and fraction = 1
    group by trial
),

-- one row
over_seeds as (
    select avg(decades) as measured, count(decades) as n, stddev_samp(decades) / sqrt(count(decades)) as error
    from by_trial
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)

-- --- Figure 5: moments by layer at initialisation -------------------------------------------------------------------

-- name: moments_of_settings
-- One row per setting, moment and layer: mean over channels, geometric mean over seeds, less and plus the deviation of the
-- channels.
select
    moment as panel,
    setting,
    layer_index,
    exp(avg(ln(if(moment = 'channel means', mean, sd)))) as reading,
    reading - avg(if(moment = 'channel means', mean_sd, sd_sd)) as low,
    reading + avg(if(moment = 'channel means', mean_sd, sd_sd)) as high,
    count(*) as n
from channel_moments
join settings using (trial)
cross join (values ('channel means'), ('channel deviations')) as moments (moment)
where step = 0 and mean > 0 and sd > 0
group by moment, setting, layer_index
order by panel desc, setting, layer_index

-- name: moments_by_layer
-- The same for the settings that the paper compares.
select *
from moments_of_settings
where setting in ('no norm', 'batch norm')
order by panel desc, setting, layer_index

-- name: growth_of_moments
-- One row per setting, moment and unit (natural or decimal logarithm): channel means or deviations at layer 102 over those at
-- layer 6, over seeds.
with
-- one row per trial and moment
by_trial as (
    select
        trial,
        moment,
        ln(max(if(moment = 'mean', mean, sd)) filter (where layer_index = 102))
            - ln(max(if(moment = 'mean', mean, sd)) filter (where layer_index = 6)) as growth
    from channel_moments
    cross join (values ('mean'), ('deviation')) as moments (moment)
    where step = 0
    group by trial, moment
),

-- one row per setting, moment and unit
over_seeds as (
    select
        setting,
        moment,
        unit,
        avg(growth / size) as measured,
        count(growth) as n,
        stddev_samp(growth / size) / sqrt(count(growth)) as error
    from by_trial
    join settings using (trial)
    cross join (values ('natural', 1.0), ('decades', ln(10))) as units (unit, size)
    where papers
    group by setting, moment, unit
)

select setting, moment, unit, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by setting, moment, unit

-- --- Figure 6: class bias -------------------------------------------------------------------------------------------

-- name: gradients_of_classes
-- One row per setting that the paper compares, image and class: gradient of the loss with respect to the logit, first seed,
-- biases as they are and evened.
select setting || if(biases = 'evened', ', evened', '') as panel, image, output, gradient as reading
from class_bias
join first_seed using (trial)
where step = 0 and setting in ('no norm', 'batch norm')
order by setting desc, biases, image, output

-- name: activations_of_classes
-- One row per setting that the paper compares, image and class: the logit, first seed, biases as they are and evened.
select setting || if(biases = 'evened', ', evened', '') as panel, image, output, logit as reading
from class_bias
join first_seed using (trial)
where step = 0 and setting in ('no norm', 'batch norm')
order by setting desc, biases, image, output

-- name: favoured_class
-- One row per setting and biases: share of the images that the commonest class takes, over seeds.
with
-- one row per trial, biases and image: the class that it is given
given as (
    select trial, biases, image, arg_max(output, logit) as output
    from class_bias
    where step = 0
    group by trial, biases, image
),

-- one row per trial, biases and class
counted as (
    select trial, biases, output, count(*) as images
    from given
    group by trial, biases, output
),

-- one row per trial and biases
by_trial as (
    select trial, biases, max(images) / sum(images) as share
    from counted
    group by trial, biases
),

-- one row per setting and biases
over_seeds as (
    select setting, biases, avg(share) as measured, count(*) as n, stddev_samp(share) / sqrt(count(*)) as error
    from by_trial
    join settings using (trial)
    group by setting, biases
)

select setting, biases, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by setting, biases

-- name: saturation
-- One row per setting: 128 times the gradient of the favoured class's logit, mean over the images of other classes; 1 where
-- its softmax is 1 for every image. Over seeds.
with
-- one row per trial and class
by_class as (
    select trial, output, sum(probability) as taken, avg(gradient * batch) filter (where label <> output) as slope
    from class_bias
    join settings using (trial)
    where step = 0 and biases = 'as they are' and papers
    group by trial, output
),

-- one row per setting
over_seeds as (
    select setting, avg(slope) as measured, count(*) as n, stddev_samp(slope) / sqrt(count(*)) as error
    from (select trial, arg_max(slope, taken) as slope from by_class group by trial)
    join settings using (trial)
    group by setting
)

select setting, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by setting

-- name: left_after_evening
-- One row: root mean square of the gradient without norm and with evened classes over that with batch norm, geometric mean
-- over the layers before the output, over seeds.
with
-- one row per setting and seed
by_trial as (
    select setting, seed, avg(ln(rms)) as size
    from gradient
    join settings using (trial)
    where step = 0 and layer <> 'output' and rms > 0
    group by setting, seed
),

-- one row per seed
by_seed as (
    select
        seed,
        max(size) filter (where setting = 'no norm, classes evened')
            - max(size) filter (where setting = 'batch norm') as ratio
    from by_trial
    group by seed
)

select exp(avg(ratio)) as measured, count(ratio) as n
from by_seed

-- --- Table 1 and figure 7: sums of gradients, and their rank --------------------------------------------------------

-- name: sums_of_gradients
-- One row per setting and layer of the paper's table: the sum of magnitudes (a) and the magnitude of the sum (b) of the
-- terms of a weight's gradient, over images and pixels, mean over the weights, and their ratio; geometric means over seeds.
with
-- one row per setting and layer
over_seeds as (
    select
        setting,
        layer_index,
        exp(avg(ln(sum_of_magnitudes / terms))) as a,
        exp(avg(ln(magnitude_of_sum / terms))) as b,
        avg(ln(sum_of_magnitudes / magnitude_of_sum)) as mean,
        stddev_samp(ln(sum_of_magnitudes / magnitude_of_sum)) / sqrt(count(*)) as error,
        count(*) as n,
        bool_and(papers) as papers
    from gradient
    join settings using (trial)
    where step = 0 and layer_index in (18, 54, 90) and magnitude_of_sum > 0
    group by setting, layer_index
)

select
    setting,
    layer_index,
    a,
    b,
    exp(mean) as ratio,
    n,
    exp(mean - t95 * error) as low,
    exp(mean + t95 * error) as high,
    if(papers, ratio, null) as measured
from over_seeds
left join student using (n)
order by layer_index, setting

-- name: table_1
-- One row per setting, layer and column of the paper's table, at the paper's size.
select setting, layer_index, part, if(part = 'a', a, b) as measured, n
from sums_of_gradients
cross join (values ('a'), ('b')) as parts (part)
where sums_of_gradients.measured is not null
order by setting, layer_index, part

-- name: least_gain_in_alignment
-- One row: with batch norm over without it, the ratio of the sum of magnitudes to the magnitude of the sum, in the layer of
-- the table where that is least; geometric means over seeds.
with
-- one row per layer
by_layer as (
    select
        layer_index,
        max(measured) filter (where setting = 'batch norm') / max(measured) filter (where setting = 'no norm') as gain,
        min(n) filter (where setting in ('batch norm', 'no norm')) as n
    from sums_of_gradients
    group by layer_index
)

select min(gain) as measured, min(n) as n
from by_layer
where gain is not null

-- name: matrix_of_layer_45
-- One row per setting that the paper compares and pair of channels of layer 45: magnitude of the gradient, first seed.
select setting, input, output, magnitude
from gradient_matrix
join first_seed using (trial)
where layer_index = 45 and step = 0 and setting in ('no norm', 'batch norm')
order by setting desc, output, input

-- name: rank_of_gradients
-- One row per setting and layer: effective rank of the gradient over the most that it can be, and the same of its
-- magnitudes over input and output channels, as figure 7 shows them; means over seeds.
select
    setting,
    layer_index,
    avg(effective_rank / full_rank) as rank,
    avg(channel_rank / full_channel_rank) as channel_rank,
    count(*) as n
from gradient
join settings using (trial)
where step = 0 and effective_rank is not null and layer_index > 1
group by setting, layer_index
order by setting, layer_index

-- name: rank_over_channels
-- One row per setting and layer: effective rank of the magnitudes over channels, over the most that it can be.
select setting, layer_index, channel_rank, n
from rank_of_gradients
order by setting, layer_index

-- name: rank_of_layer_45
-- One row per setting: effective rank of the matrix that figure 7 shows, over the most that it can be.
select setting, channel_rank as measured, n
from rank_of_gradients
where layer_index = 45

-- name: loss_of_rank
-- One row: effective rank of the gradient without norm over that with batch norm, mean over the layers between the stem and
-- the output and over seeds.
with
-- one row per layer
by_layer as (
    select
        layer_index,
        max(rank) filter (where setting = 'no norm') / max(rank) filter (where setting = 'batch norm') as ratio,
        least(max(n) filter (where setting = 'no norm'), max(n) filter (where setting = 'batch norm')) as n
    from rank_of_gradients
    where layer_index < (select max(layer_index) from rank_of_gradients)
    group by layer_index
)

select avg(ratio) as measured, min(n) as n
from by_layer
where ratio is not null

-- --- Section 2.1 and the first reviewer: what differs between mini-batches -------------------------------------------

-- name: variance_between_units
-- One row per setting and layer: variance of the gradient's length between the units of the layer over that between
-- mini-batches, each a mean over seeds.
select setting, layer_index, avg(between_units) / avg(between_batches) as ratio, count(*) as n
from mean_gradient
join settings using (trial)
where step = 0 and between_batches > 0
group by setting, layer_index
order by setting, layer_index

-- name: units_against_batches
-- One row per setting: the median over its layers of the variance between units over that between mini-batches.
select setting, median(ratio) as measured, min(n) as n
from variance_between_units
group by setting

-- name: noise
-- One row per setting and size of a mini-batch: |B| times the variance of its gradient, over the same for the smallest
-- mini-batches, geometric mean over seeds with their range: 1 where the variance falls as 1 / |B|.
with
-- one row per trial and size
by_trial as (
    select
        trial,
        gradient_noise.batch as images,
        gradient_noise.batch * variance as times,
        first(gradient_noise.batch * variance) over (partition by trial order by gradient_noise.batch) as smallest
    from gradient_noise
    where step = 0 and variance > 0
)

select
    setting,
    images,
    exp(avg(ln(times / smallest))) as ratio,
    min(times / smallest) as low,
    max(times / smallest) as high,
    exp(avg(ln(times))) as c,
    count(*) as n
from by_trial
join settings using (trial)
group by setting, images
order by setting, images

-- name: noise_of_a_step
-- One row per setting that the paper compares and size of a mini-batch: variance of a step at the trial's learning rate,
-- lr^2 times that of the gradient, and the bound lr^2 C / |B| with C from the smallest mini-batches; over seeds.
with
-- one row per trial and size
by_trial as (
    select
        trial,
        gradient_noise.batch as images,
        variance,
        first(gradient_noise.batch * variance) over (partition by trial order by gradient_noise.batch) as c
    from gradient_noise
    where step = 0 and variance > 0
)

select
    setting,
    images,
    exp(avg(ln(lr * lr * variance))) as variance,
    exp(avg(ln(lr * lr * c / images))) as bound,
    count(*) as n
from by_trial
join settings using (trial)
where compared
group by setting, images
order by setting, images

-- name: noise_and_bound
-- One row per setting that the paper compares, size of a mini-batch, and variance of a step or its bound.
select setting, images, what, if(what = 'measured', variance, bound) as variance
from noise_of_a_step
cross join (values ('measured'), ('lr^2 C / |B|')) as parts (what)
order by setting desc, what, images

-- name: fall_of_noise
-- One row per setting: slope of the logarithm of the variance of a mini-batch's gradient over that of its size, over seeds.
with
-- one row per trial
by_trial as (
    select trial, regr_slope(ln(variance), ln(gradient_noise.batch)) as slope
    from gradient_noise
    where step = 0 and variance > 0
    group by trial
),

-- one row per setting
over_seeds as (
    select setting, avg(slope) as measured, count(slope) as n, stddev_samp(slope) / sqrt(count(slope)) as error
    from by_trial
    join settings using (trial)
    group by setting
)

select setting, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by setting

-- name: gain_in_noise
-- One row: decades by which the variance of a step with the trial's batch is larger with batch norm at its rate than
-- without norm at its own.
with
-- one row per setting: at the largest mini-batch
at_batch as (
    select setting, arg_max(variance, images) as variance, arg_max(n, images) as n
    from noise_of_a_step
    group by setting
)

select
    log10(max(variance) filter (where setting = 'batch norm') / max(variance) filter (where setting = 'no norm')) as measured,
    min(n) as n
from at_batch

-- --- The third reviewer: the part of the gradient that does not depend on the images ---------------------------------

-- name: independent_part
-- One row per setting and layer: share of a mini-batch's squared gradient that is common to all, without bias, so that it
-- may come out below 0; and the radial share of the squared mean gradient. Means over seeds.
select
    setting,
    layer_index,
    avg(mean_square - batch_variance / batches) / avg(batch_square) as common,
    avg(radial * radial / mean_square) as radial,
    count(*) as n
from mean_gradient
join settings using (trial)
where step = 0 and mean_square > 0
group by setting, layer_index
order by setting, layer_index

-- name: radial_part
-- One row per setting and layer: radial share of the squared common gradient, mean over seeds.
select setting, layer_index, radial, n
from independent_part
order by setting, layer_index

-- name: common_share
-- One row per setting: share of a mini-batch's squared gradient that is common to all, mean over the layers.
select setting, avg(common) as measured, min(n) as n
from independent_part
group by setting

-- name: radial_share
-- One row per setting: radial share of the squared common gradient, mean over the layers.
select setting, avg(radial) as measured, min(n) as n
from independent_part
group by setting

-- name: loss_along_the_common_part
-- One row per setting that the paper compares, direction and length at which every seed was looked at, and no loss left the
-- numbers: loss over the loss before, geometric mean over seeds with their range.
select
    setting,
    direction,
    length,
    exp(avg(ln(least(relative, 1e300)))) as relative,
    min(relative) as minimum,
    max(relative) as maximum,
    count(*) as n
from loss_along_mean_gradient
join settings using (trial)
where compared and step = 0
group by setting, direction, length
qualify n = max(n) over (partition by setting, direction) and maximum < 'infinity'::double
order by setting desc, direction, length

-- name: narrowness
-- One row: without norm, where a step along the common part first multiplies the loss by more than 1,000, by how much a
-- random step of the same length multiplies it; geometric mean over seeds. Of the lengths at which both were looked at: where
-- the loss along one jumps, it alone is looked at more closely. A loss that left the numbers counts as 1e30 times.
with
-- one row per trial
by_trial as (
    select trial, arg_min(beside.relative, length) as relative
    from loss_along_mean_gradient as common
    join loss_along_mean_gradient as beside using (trial, step, length)
    join settings using (trial)
    where
        common.direction = 'mean gradient'
        and common.relative > 1e3
        and beside.direction = 'random'
        and step = 0
        and setting = 'no norm'
    group by trial
)

select exp(avg(ln(least(relative, 1e30)))) as measured, count(*) as n
from by_trial

-- name: descent_along_the_common_part
-- One row: without norm, the least loss along the common part over the loss before; geometric mean over seeds.
with
-- one row per trial
by_trial as (
    select trial, min(relative) as least
    from loss_along_mean_gradient
    join settings using (trial)
    where direction = 'mean gradient' and step = 0 and setting = 'no norm'
    group by trial
)

select exp(avg(ln(least))) as measured, count(*) as n
from by_trial
